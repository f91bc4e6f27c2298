"""A Hub with the two base models and the seven released LoRAs, all tiny, written by diffusers and peft themselves."""

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.base_models.stable_diffusion import LORA_SUFFIXES
from tests.tiny import (
    LATENT_CHANNELS,
    NUM_FRAMES,
    SIZE,
    TEXT_DIM,
    VAE_FACTOR,
    save_tiny_base,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

MODELSCOPE, STABLE_DIFFUSION, ADAPTER = (
    "ali-vilab/text-to-video-ms-1.7b",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "guoyww/animatediff-motion-adapter-v1-5-2",
)
RELEASED = {
    **{f"modelscopet2v-{name}": "modelscope" for name in ("webvid", "laion", "anime", "real", "3d-cartoon")},
    **{f"animatediff-{name}": "animatediff" for name in ("webvid", "laion")},
}
WIDTHS = dict(block_out_channels=(8, 16), layers_per_block=1)


def _seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():  # zeros hide mistakes: AnimateDiff's proj_out starts as zero
            if not parameter.any():
                parameter.data.normal_(std=0.05)
    return model.eval().requires_grad_(False)


def tiny_image_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet, with every kind of module a LoRA is put on."""
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=SIZE // VAE_FACTOR,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=2,
            norm_num_groups=4,
            **WIDTHS,
        )
    )


def tiny_motion_adapter() -> MotionAdapter:
    return _seeded(
        lambda: MotionAdapter(
            block_out_channels=WIDTHS["block_out_channels"],
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
        ),
        seed=1,
    )


def tiny_motion_unet() -> UNetMotionModel:
    return UNetMotionModel.from_unet2d(tiny_image_unet(), tiny_motion_adapter()).eval().requires_grad_(False)


def stable_diffusion() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=tiny_image_unet(),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        # what the repository of Stable Diffusion 1.5 says
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def released_unet(base_model: str) -> UNet3DConditionModel | UNetMotionModel:
    return tiny_unet().requires_grad_(False) if base_model == "modelscope" else tiny_motion_unet()


def peft_model(base_model: str, seed: int = 0, rank: int = 4, alpha: float = 4, **options):
    """A tiny base model with the authors' kind of LoRA in it: peft's own, on these names, random."""
    unet = released_unet(base_model)
    targets = get_base_model(base_model).lora_target_modules(unet)
    assert {suffix for suffix in LORA_SUFFIXES for name in targets if name.endswith("." + suffix)} == set(
        LORA_SUFFIXES
    )
    model = get_peft_model(unet, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval().requires_grad_(False)


def save_released(folder: str | Path, base_model: str, **options) -> Path:
    """adapter_model.safetensors and adapter_config.json, and the README.md that peft adds."""
    peft_model(base_model, **options).save_pretrained(str(folder))
    return Path(folder)


def save_hub(root: Path) -> Path:
    """`root/owner/name`, as `tests.hub_server` serves them."""
    save_tiny_base(root / MODELSCOPE)
    stable_diffusion().save_pretrained(root / STABLE_DIFFUSION)
    tiny_motion_adapter().save_pretrained(root / ADAPTER)
    for base_model in set(RELEASED.values()):
        first = save_released(root / "made" / base_model, base_model)
        tensors = load_file(first / "adapter_model.safetensors")
        for number, name in enumerate(name for name, made_for in RELEASED.items() if made_for == base_model):
            folder = shutil.copytree(first, root / "yhzhai/mcm" / name)
            strength = {key: tensor * (1 + number * ("lora_B" in key)) for key, tensor in tensors.items()}
            save_file(strength, folder / "adapter_model.safetensors")
    return root


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def call(unet, seed: int = 0) -> torch.Tensor:
    """One call of a denoiser of either kind in float64, `(1, 4, T, 8, 8)`; `unet` may be peft's wrapper."""
    unet = copy.deepcopy(unet).double()
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, LATENT_CHANNELS, NUM_FRAMES, 8, 8, generator=generator, dtype=torch.float64)
    embeds = torch.randn(1, 5, TEXT_DIM, generator=generator, dtype=torch.float64)
    inner = unet.get_base_model() if hasattr(unet, "get_base_model") else unet
    if isinstance(inner, UNetMotionModel):
        embeds = embeds.repeat_interleave(NUM_FRAMES, 0)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), embeds).sample


def sample(pipe, steps: int = 2, seed: int = 0, **options) -> torch.Tensor:
    """Latents `(1, 4, T, 8, 8)` of a video without guidance, from any pipeline, which computes in float64 from now."""
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float64)
    options = dict(num_frames=NUM_FRAMES, height=SIZE, width=SIZE, guidance_scale=1.0, output_type="latent") | options
    generator = torch.Generator().manual_seed(seed)
    return pipe("a red ring", num_inference_steps=steps, generator=generator, **options).frames
