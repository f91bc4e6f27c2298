"""Pipelines with random weights: of a base model's full size, or of its architecture made tiny."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    UNet3DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UMT5Config, UMT5EncoderModel

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.lora import add_lora

LORA_RANK = {"full": 64, "tiny": 4}
PIPELINES = {"modelscope": ModelScopeMCMPipeline, "animatediff": AnimateDiffMCMPipeline}
SIZES = tuple(LORA_RANK)


def random_pipeline(base_model: str, size: str, dtype: torch.dtype, device: str = "cpu") -> MCMPipeline:
    """The pipeline of a base model, with weights drawn in place where they belong."""
    unet, vae, text_encoder = (build(dtype, device) for build in networks(base_model, size))
    pipeline = PIPELINES[base_model](
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=CLIPTokenizer(model_max_length=77),
        scheduler=MCMScheduler(**scheduler_config(base_model)),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_random_lora(pipeline: MCMPipeline, size: str) -> None:
    """An active LoRA on every module that MCM puts one on, at the rank of the released ones."""
    rank = LORA_RANK[size]
    add_lora(pipeline.denoiser, pipeline.base_model.lora_target_modules(pipeline.denoiser), rank=rank, alpha=rank)


def scheduler_config(base_model: str) -> dict:
    defaults = PIPELINES[base_model].base_model.scheduler_config(None)
    return {
        key: value for key, value in defaults.items() if key in PIPELINES[base_model].base_model.noise_schedule_keys
    }


def networks(base_model: str, size: str) -> tuple[Callable, Callable, Callable]:
    """Functions of (dtype, device) that make denoiser, autoencoder and text encoder."""
    return tuple(partial(materialise, each) for each in architectures(base_model, size))


# The teachers of a training, and the base model of each.
TEACHERS = {"modelscope": "modelscope", "animatediff": "animatediff"}
TEACHERS |= {"wan-1.3b": "wan", "wan-14b": "wan", "wan-5b": "wan-ti2v"}


WAN_BLOCKS = {"wan-1.3b": 30, "wan-14b": 40, "wan-5b": 30}


def architectures(teacher: str, size: str, blocks: int | None = None) -> tuple[Callable[[], nn.Module], ...]:
    """Functions that make denoiser, autoencoder and text encoder, as their classes initialise them; a Wan has as many
    blocks as are asked for."""
    if teacher not in WAN_BLOCKS:
        return _stable_diffusion(teacher, size)
    return _wan(teacher, size, blocks or (2 if size == "tiny" else WAN_BLOCKS[teacher]))


def _wan(teacher: str, size: str, blocks: int) -> tuple[Callable[[], nn.Module], ...]:
    heads, ffn = {"wan-1.3b": (12, 8960), "wan-14b": (40, 13824), "wan-5b": (24, 14336)}[teacher]
    vae = dict(base_dim=96, z_dim=16)
    if teacher == "wan-5b":
        vae = dict(base_dim=160, decoder_base_dim=256, z_dim=48, in_channels=12, out_channels=12, is_residual=True)
        vae |= dict(patch_size=2, scale_factor_spatial=16)
    text = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=256384)
    width = 128
    if size == "tiny":
        heads, ffn, width = 2, 64, 16
        vae |= dict(base_dim=16) | ({"decoder_base_dim": 16} if teacher == "wan-5b" else {})
        text = dict(d_model=32, d_ff=64, d_kv=8, num_heads=2, num_layers=2, vocab_size=64)
    channels = vae["z_dim"]
    vae |= dict(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    transformer = dict(num_attention_heads=heads, attention_head_dim=width, ffn_dim=ffn, num_layers=blocks)
    transformer |= dict(in_channels=channels, out_channels=channels, text_dim=text["d_model"])
    return (
        lambda: WanTransformer3DModel(**transformer),
        lambda: AutoencoderKLWan(**vae),
        lambda: UMT5EncoderModel(UMT5Config(**text)),
    )


def _stable_diffusion(base_model: str, size: str) -> tuple[Callable[[], nn.Module], ...]:
    denoiser_class, options = {
        "modelscope": (UNet3DConditionModel, dict(sample_size=32, cross_attention_dim=1024, attention_head_dim=64)),
        "animatediff": (UNetMotionModel, dict(sample_size=64, cross_attention_dim=768, num_attention_heads=8)),
    }[base_model]
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    width, layers = {"modelscope": (1024, 23), "animatediff": (768, 12)}[base_model]
    text = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, vocab_size=49408)
    if base_model == "animatediff":
        options |= dict(block_out_channels=(320, 640, 1280, 1280))
    if size == "tiny":
        options |= dict(sample_size=4, block_out_channels=(32, 32, 64, 64), cross_attention_dim=64)
        options |= {key: 2 if "num" in key else 16 for key in options if key.endswith(("heads", "head_dim"))}
        vae |= dict(block_out_channels=(32,) * 4, layers_per_block=1)
        text |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    text |= dict(intermediate_size=4 * text["hidden_size"], max_position_embeddings=77)
    return (
        lambda: denoiser_class(**options),
        lambda: AutoencoderKL(**vae),
        lambda: CLIPTextModel(CLIPTextConfig(**text, bos_token_id=0, eos_token_id=1)),
    )


def materialise(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A module whose parameters are drawn once, in their own place and type; the initialisers of a thousand million
    parameters take minutes, and twice the memory."""
    with init_empty_weights():
        module = build()
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            data = torch.empty(parameter.shape, dtype=dtype, device=device)
            if data.ndim == 1:
                data.fill_(name == "weight")  # of a normalisation; the others are biases
            else:
                for piece in data.view(-1).split(len(noise)):
                    piece.copy_(noise[: len(piece)])
            setattr(part, name, nn.Parameter(data, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return module.eval()
