"""ModelScope text-to-video: a UNet with temporal layers, an image autoencoder for the frames, CLIP's text tower.

This file is everything the package knows about that model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from numbers import Integral

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet3DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTokenizer

from .. import hub
from ..lora import base_layer
from ..pipelines.mcm import MCMPipeline
from .base import BaseModel, Components, Text

logger = logging.getLogger(__name__)

# Suffixes of the modules that carry a LoRA. The temporal convolutions (Conv3d, in `temp_convs`) and the entrance, exit
# and time embedding of the network do not.
LORA_SUFFIXES = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("proj_in", "proj_out"),
    *("ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)


class ModelScope(BaseModel):
    name = "modelscope"
    default_repository = "ali-vilab/text-to-video-ms-1.7b"
    denoiser_class = "UNet3DConditionModel"
    guidance_range = (5.0, 15.0)
    height = 256
    width = 256
    num_frames = 16
    scheduler_defaults = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
    }

    # --- loading -----------------------------------------------------------------------------------------------------
    def load(
        self,
        repository: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
        **hub_options,
    ) -> Components:
        source = hub.resolve(repository or self.default_repository)
        where = dict(revision=revision, **hub_options)

        def part(name: str) -> dict:
            return dict(subfolder=f"{subfolder}/{name}" if subfolder else name, **where)

        denoiser = UNet3DConditionModel.from_pretrained(source, dtype=dtype, **part("unet"))
        vae = AutoencoderKL.from_pretrained(source, dtype=dtype, **part("vae"))
        text_encoder = CLIPTextModel.from_pretrained(source, dtype=dtype, **part("text_encoder"))
        for module in (denoiser, vae, text_encoder):
            module.requires_grad_(False).eval()
        scheduler = hub.read_json(source, "scheduler_config.json", **part("scheduler"))
        return Components(
            denoiser=denoiser,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=CLIPTokenizer.from_pretrained(source, **part("tokenizer")),
            scheduler_config=self.scheduler_config(scheduler),
            sampling=self.read_sampling(source, denoiser, vae, subfolder=subfolder, **where),
        )

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(name.startswith("transformer_in.") or ".temp_attentions." in name for name in module_names)

    def lora_target_modules(self, denoiser: nn.Module) -> list[str]:
        suffixes = tuple("." + suffix for suffix in LORA_SUFFIXES)
        return sorted(
            name
            for name, module in denoiser.named_modules()
            if isinstance(base_layer(module), (nn.Linear, nn.Conv2d)) and name.endswith(suffixes)
        )

    def enable_gradient_checkpointing(self, denoiser: nn.Module) -> None:
        # UNet3D refuses diffusers' own switch.
        for block in (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def pipeline_class(self) -> type:
        return ModelScopeMCMPipeline

    def sampling_default(self, name: str, denoiser: nn.Module, vae: nn.Module) -> int:
        size = denoiser.config.sample_size
        if name in ("height", "width") and size is not None:
            size = size if isinstance(size, int) else size[name == "width"]
            return size * self.vae_scale_factor(vae)
        return super().sampling_default(name, denoiser, vae)

    # --- the tensors -------------------------------------------------------------------------------------------------
    def vae_scale_factor(self, vae: nn.Module) -> int:
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        factor = self.vae_scale_factor(vae)
        if not isinstance(num_frames, Integral) or num_frames < 1:
            raise ValueError(f"`num_frames` must be a whole number of at least 1, got {num_frames!r}.")
        for side, size in (("height", height), ("width", width)):
            if not isinstance(size, Integral) or size < factor or size % factor:
                raise ValueError(f"`{side}` must be a positive multiple of {factor}, got {size!r}.")
        return denoiser.config.in_channels, num_frames, height // factor, width // factor

    def encode_video(self, vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        batch = pixels.shape[0]
        posterior = vae.encode(_frames(pixels).to(vae.dtype)).latent_dist
        latents = posterior.mean
        if noise is not None:
            latents = latents + posterior.std * _frames(noise).to(latents.dtype)
        return _videos(latents * vae.config.scaling_factor, batch)

    def decode_video(self, vae: nn.Module, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        frames = _frames(latents)
        chunks = frames.split(chunk_size or len(frames))
        return _videos(torch.cat([self._decode(vae, chunk) for chunk in chunks]), latents.shape[0])

    def decode_frames(self, vae: nn.Module, latents: torch.Tensor, frame_indices: torch.Tensor) -> torch.Tensor:
        indices = frame_indices.to(latents.device)
        samples = torch.arange(len(latents), device=latents.device)[:, None]
        chosen = latents.transpose(1, 2)[samples, indices]  # (B, l, C, H, W)
        return self._decode(vae, chosen.flatten(0, 1))

    def _decode(self, vae: nn.Module, frames: torch.Tensor) -> torch.Tensor:
        return vae.decode(frames.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    @torch.no_grad()
    def encode_text(self, tokenizer, text_encoder: nn.Module, prompts: list[str]) -> Text:
        limit = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        for prompt, full in zip(prompts, tokenizer(prompts, verbose=False).input_ids):
            if len(full) > limit:
                lost = tokenizer.decode(full[limit - 1 : -1])
                logger.warning("The text encoder reads %d tokens; of %r it will not see %r.", limit, prompt, lost)
        # Where weights are offloaded one by one the encoder is nowhere, and accelerate's hook moves what it is given.
        device = torch.device("cpu") if text_encoder.device.type == "meta" else text_encoder.device
        return {"prompt_embeds": text_encoder(tokens.input_ids.to(device))[0]}

    def denoise(self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Text) -> torch.Tensor:
        return denoiser(latents, timesteps, encoder_hidden_states=text["prompt_embeds"], return_dict=False)[0]


class ModelScopeMCMPipeline(MCMPipeline):
    """
    Few-step text to video with ModelScope.

    Args:
        vae ([`AutoencoderKL`]): Encodes and decodes single frames.
        text_encoder ([`CLIPTextModel`]), tokenizer ([`CLIPTokenizer`]): Encode the prompt.
        unet ([`UNet3DConditionModel`]): The denoiser.
        scheduler ([`MCMScheduler`]): Any scheduler of diffusers works too, for comparison.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model = ModelScope()
    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: float | None = None,
    ):
        super().__init__()
        sampling = dict(
            height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, fps=fps
        )
        self._set_up(sampling, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)


def _frames(videos: torch.Tensor) -> torch.Tensor:
    """`(B, C, T, H, W)` to `(B * T, C, H, W)`."""
    return videos.transpose(1, 2).flatten(0, 1)


def _videos(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """`(B * T, C, H, W)` to `(B, C, T, H, W)`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
