"""What the descendants of Stable Diffusion have in common: an image autoencoder for the frames, CLIP's text tower."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..conditioning import Conditioning
from ..consistency import SIGMA_DATA, TIMESTEP_SCALING, VariancePreservingPath
from ..lora import base_layer
from ..scheduler import MCMScheduler
from .base import BaseModel
from .checkpointing import layers_of, recompute
from .precision import find_ends
from .tokens import tokenize

# Suffixes of the modules that carry a LoRA. ModelScope's temporal convolutions (Conv3d, in `temp_convs`) and the
# entrance, exit and time embedding of the network do not.
LORA_SUFFIXES = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("proj_in", "proj_out"),
    *("ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)

# Encoded in one call: 4 frames of 512×512, for which the encoder needs 1.8 GiB in half precision.
PIXELS_AT_ONCE = 2**20


class StableDiffusionModel(BaseModel):
    """A video UNet over the latents of single frames. A subclass says which UNet, and how it is called."""

    scheduler_class = MCMScheduler
    noise_schedule_keys = (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("prediction_type", "rescale_betas_zero_snr"),
    )
    described_scheduler_keys = (
        *("timestep_scaling", "beta_schedule", "beta_start", "beta_end", "original_inference_steps"),
    )
    student_settings = {"timestep_scaling": TIMESTEP_SCALING, "sigma_data": SIGMA_DATA}
    scheduler_defaults = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
    }

    def check_components(self, denoiser: nn.Module, vae: nn.Module) -> None:
        channels, latents = denoiser.config.in_channels, vae.config.latent_channels
        if channels != latents:
            raise ValueError(
                f"This {type(denoiser).__name__} takes {channels} channels, the latents have {latents}: it is one for"
                " inpainting, or for making a picture move. Text to video needs the text-to-image (or text-to-video)"
                " model of the same name."
            )

    def noise_path(self, scheduler_config: Mapping[str, Any] | None = None, **student: Any) -> VariancePreservingPath:
        return VariancePreservingPath.from_scheduler_config(self.scheduler_config(scheduler_config), **student)

    def student_scheduler(self, config: Mapping[str, Any], *, num_solver_steps: int, **student: float) -> MCMScheduler:
        return self.scheduler_class.from_config(
            config,
            # Schedulers have σ_d = 0.5 for good; eq. 1 depends on timestep_scaling / σ_d only.
            timestep_scaling=student["timestep_scaling"] * SIGMA_DATA / student["sigma_data"],
            original_inference_steps=num_solver_steps,
            clip_sample=False,
            thresholding=False,
        )

    def lora_target_modules(self, denoiser: nn.Module) -> list[str]:
        suffixes = tuple("." + suffix for suffix in LORA_SUFFIXES)
        return sorted(
            name
            for name, module in denoiser.named_modules()
            if isinstance(base_layer(module), (nn.Linear, nn.Conv2d)) and name.endswith(suffixes)
        )

    def prepare_denoiser(self, denoiser: nn.Module) -> None:
        find_ends(denoiser)

    def enable_gradient_checkpointing(self, denoiser: nn.Module) -> None:
        # diffusers' own switch is refused by UNet3D, and leaves out the motion modules of AnimateDiff.
        recompute(layers_of((*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks)))

    def enable_decoder_checkpointing(self, vae: nn.Module) -> None:
        recompute(layers_of((vae.decoder.mid_block, *vae.decoder.up_blocks)))

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

    def encode_posterior(self, vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = _frames(pixels)
        at_once = max(PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]), 1)
        posteriors = [vae.encode(chunk.to(vae.dtype)).latent_dist for chunk in frames.split(at_once)]
        mean, deviation = (torch.cat([getattr(each, name) for each in posteriors]) for name in ("mean", "std"))
        return _videos(mean, pixels.shape[0]), _videos(deviation, pixels.shape[0])

    def scale_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        return latents * vae.config.scaling_factor

    def decode_video(self, vae: nn.Module, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        frames = _frames(latents)
        chunks = frames.split(chunk_size or len(frames))
        return _videos(torch.cat([self._decode(vae, chunk) for chunk in chunks]), latents.shape[0])

    def decode_frames(
        self, vae: nn.Module, latents: torch.Tensor, frame_indices: torch.Tensor, decoder: str = "exact"
    ) -> torch.Tensor:
        indices = frame_indices.to(latents.device)
        samples = torch.arange(len(latents), device=latents.device)[:, None]
        chosen = latents.transpose(1, 2)[samples, indices]  # (B, l, C, H, W)
        return self._decode(vae, chosen.flatten(0, 1))

    def _decode(self, vae: nn.Module, frames: torch.Tensor) -> torch.Tensor:
        return vae.decode((frames / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def text_features(self, denoiser: nn.Module) -> int | None:
        features = denoiser.config.get("cross_attention_dim")
        return features if isinstance(features, int) else None

    @torch.no_grad()
    def encode_text(self, tokenizer, text_encoder: nn.Module, prompts: list[str], clip_skip: int = 0) -> Conditioning:
        """`prompt_embeds (B, length, features)`: the encoder's output, or that of `clip_skip` layers before its last,
        normalised like the last."""
        tokens = tokenize(tokenizer, prompts, tokenizer.model_max_length, text_encoder)
        output = text_encoder(tokens.input_ids, output_hidden_states=bool(clip_skip))
        if not clip_skip:
            return {"prompt_embeds": output[0]}
        normalise = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
        return {"prompt_embeds": normalise(output.hidden_states[-1 - clip_skip])}


def _frames(videos: torch.Tensor) -> torch.Tensor:
    """`(B, C, T, H, W)` to `(B * T, C, H, W)`."""
    return videos.transpose(1, 2).flatten(0, 1)


def _videos(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """`(B * T, C, H, W)` to `(B, C, T, H, W)`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
