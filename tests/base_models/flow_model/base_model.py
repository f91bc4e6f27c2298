"""A tiny video model that has nothing in common with Stable Diffusion: a transformer on a flow path, a causal VAE.

Its networks are of Wan's classes. This file is everything about them that the package is told; `pipeline.py` samples
the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffusers_mcm.base_models import BaseModel
from diffusers_mcm.conditioning import Conditioning
from diffusers_mcm.consistency import NoisePath, PredictionType
from diffusers_mcm.lora import base_layer

MASK = "prompt_attention_mask"
TEXT_LENGTH = 12  # tokens
FRAMES_PER_LATENT = 4  # but the first, which stands for one
LORA_SUFFIXES = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ffn.net.0.proj", ".ffn.net.2")


class FlowPath(NoisePath):
    """x_t = (1 − σ) x_0 + σ ε with σ = t / 1000, of which the network predicts the velocity ε − x_0.

    The grid is shifted: σ = s u / (1 + (s − 1) u) for u = 1/N, 2/N, …, 1.
    """

    prediction = PredictionType(
        x0=lambda output, x_t, alpha, sigma: x_t - sigma * output,
        noise=lambda output, x_t, alpha, sigma: x_t + alpha * output,
    )
    terminal_timestep = 1000.0

    def __init__(self, shift: float):
        self.shift = shift

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = t.to(torch.promote_types(t.dtype, torch.float32)) / 1000
        return 1 - sigma, sigma

    def solver_timesteps(self, num_solver_steps: int = 48) -> torch.Tensor:
        return self._timesteps(torch.arange(1, num_solver_steps + 1), num_solver_steps)

    def previous_timestep(self, t: torch.Tensor, num_solver_steps: int = 48) -> torch.Tensor:
        sigma = t.double() / 1000
        index = (num_solver_steps * sigma / (self.shift - (self.shift - 1) * sigma)).round()
        return self._timesteps((index - 1).clamp(min=0), num_solver_steps)

    def _timesteps(self, index: torch.Tensor, num_solver_steps: int) -> torch.Tensor:
        u = index.double() / num_solver_steps
        return (1000 * self.shift * u / (1 + (self.shift - 1) * u)).to(torch.float32)


class FlowConsistencyScheduler(SchedulerMixin, ConfigMixin):
    """Multistep consistency sampling on the flow path: predict x_0, add noise again for the next timestep.

    Its timesteps are real numbers. It has neither `init_noise_sigma` nor `scale_model_input`, as diffusers' flow
    schedulers.
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 5.0, original_inference_steps: int = 48):
        self.timesteps = FlowPath(shift).solver_timesteps(original_inference_steps).flip(0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        steps = self.config.original_inference_steps
        grid = FlowPath(self.config.shift).solver_timesteps(steps).flip(0)
        if timesteps is None:
            chosen = grid[np.arange(num_inference_steps) * steps // num_inference_steps]
        else:
            chosen = torch.as_tensor(timesteps, dtype=torch.float32)
        self.timesteps = chosen.to(device)

    @property
    def sigmas(self) -> torch.Tensor:
        """What `WanPipeline` shows its caches."""
        return self.timesteps / 1000

    def set_begin_index(self, begin_index: int = 0) -> None:
        """`WanPipeline` calls it with 0; there is nothing to set."""

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True) -> tuple:
        index = int((self.timesteps == timestep).nonzero()[0])
        x_0 = sample - timestep / 1000 * model_output
        if index + 1 == len(self.timesteps):
            return (x_0,)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        sigma = self.timesteps[index + 1] / 1000
        return ((1 - sigma) * x_0 + sigma * noise,)


class FlowModel(BaseModel):
    name = "flow"
    default_repository = "nobody/flow"
    denoiser_name = "transformer"
    denoiser_classes = ("WanTransformer3DModel",)
    guidance_range = (2.0, 4.0)
    height = 16
    width = 16
    num_frames = 9
    fps = 16
    negative_prompt = "still"
    scheduler_class = FlowConsistencyScheduler
    scheduler_defaults = {"num_train_timesteps": 1000, "shift": 5.0}
    noise_schedule_keys = ("num_train_timesteps",)  # a shift is a way of sampling the teacher; the student has its own
    described_scheduler_keys = ("shift", "original_inference_steps")

    # --- what a repository holds -------------------------------------------------------------------------------------
    def noise_path(self, scheduler_config: Mapping[str, Any] | None = None, **boundary: Any) -> FlowPath:
        return FlowPath(self.scheduler_config(scheduler_config)["shift"])

    def student_scheduler(
        self, config: Mapping[str, Any], *, num_solver_steps: int, **boundary: Any
    ) -> FlowConsistencyScheduler:
        return self.scheduler_class.from_config(config, original_inference_steps=num_solver_steps)

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(name.startswith("blocks.") and ".attn1." in name for name in module_names)

    def lora_target_modules(self, denoiser: nn.Module) -> list[str]:
        return sorted(
            name
            for name, module in denoiser.named_modules()
            if isinstance(base_layer(module), nn.Linear)
            and name.startswith("blocks.")
            and name.endswith(LORA_SUFFIXES)
        )

    # --- the tensors -------------------------------------------------------------------------------------------------
    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        if num_frames < 1 or num_frames % FRAMES_PER_LATENT != 1:
            raise ValueError(
                f"`num_frames` must be one more than a multiple of {FRAMES_PER_LATENT}, got {num_frames}."
            )
        factor = vae.spatial_compression_ratio
        for side, size, patch in zip(("height", "width"), (height, width), denoiser.config.patch_size[1:]):
            if size < 1 or size % (factor * patch):
                raise ValueError(f"`{side}` must be a positive multiple of {factor * patch}, got {size}.")
        frames = (num_frames - 1) // FRAMES_PER_LATENT + 1
        return denoiser.config.in_channels, frames, height // factor, width // factor

    def encode_video(self, vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        latents = at_least_float32(posterior.mean)
        if noise is not None:
            latents = latents + at_least_float32(posterior.std) * noise
        mean, std = latent_statistics(vae, latents)
        return (latents - mean) / std

    def decode_video(self, vae: nn.Module, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        return self._decode(vae, latents).clamp(-1, 1)  # frame by frame as it is: the VAE is causal

    def decode_frames(self, vae: nn.Module, latents: torch.Tensor, frame_indices: torch.Tensor) -> torch.Tensor:
        """Unlike the VAE's own `decode` it does not clamp: a clamped pixel has no gradient."""
        samples = torch.arange(len(latents), device=latents.device)[:, None]
        frames = self._decode(vae, latents).transpose(1, 2)  # (B, T, 3, H, W)
        return frames[samples, frame_indices.to(latents.device)].flatten(0, 1)

    def _decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, 4 (T - 1) + 1, H, W)`, one latent frame after the other, each with what those before left."""
        mean, std = latent_statistics(vae, latents)
        latents = vae.post_quant_conv((latents * std + mean).to(vae.dtype))
        vae.clear_cache()
        left: list[Any] = [None] * vae._conv_num
        frames = [
            vae.decoder(frame, feat_cache=left, feat_idx=[0], first_chunk=i == 0)
            for i, frame in enumerate(latents.split(1, dim=2))
        ]
        return torch.cat(frames, dim=2)

    @torch.no_grad()
    def encode_text(self, tokenizer, text_encoder: nn.Module, prompts: list[str]) -> Conditioning:
        """`prompt_embeds (B, length, features)`, zeros after the text, and which of them are text `(B, length)`."""
        options = dict(padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        tokens = tokenizer(prompts, **options).to(text_encoder.device)
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return {"prompt_embeds": embeds * tokens.attention_mask[..., None], MASK: tokens.attention_mask.bool()}

    def embeds_condition(self, prompt_embeds: torch.Tensor) -> Conditioning:
        return {"prompt_embeds": prompt_embeds, MASK: prompt_embeds.any(dim=-1)}

    def text_features(self, denoiser: nn.Module) -> int:
        return denoiser.config.text_dim

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning
    ) -> torch.Tensor:
        """In the network's type; latents and output are float32 whatever that is, and so is the time."""
        kind = getattr(denoiser, "dtype", latents.dtype)  # a function that stands for the network has none
        embeds = (text["prompt_embeds"] * text[MASK][..., None]).to(kind)
        output = denoiser(latents.to(kind), timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        return output.to(latents.dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def latent_statistics(vae: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the VAE's latents, for each channel."""
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).to(like) for name in ("mean", "std"))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
