"""ModelScope text-to-video: Stable Diffusion's UNet with temporal layers between the spatial ones.

This file is everything the package knows about the networks of that model; `pipelines.modelscope` samples it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..conditioning import Conditioning
from .precision import float32_ends
from .stable_diffusion import StableDiffusionModel


class ModelScope(StableDiffusionModel):
    name = "modelscope"
    default_repository = "ali-vilab/text-to-video-ms-1.7b"
    denoiser_classes = ("UNet3DConditionModel",)
    guidance_range = (5.0, 15.0)
    height = 256
    width = 256
    num_frames = 16

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(self.is_temporal(name) for name in module_names)

    def is_temporal(self, module: str) -> bool:
        return module.startswith("transformer_in.") or ".temp_attentions." in module

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning
    ) -> torch.Tensor:
        with float32_ends(denoiser):
            return denoiser(latents, timesteps, encoder_hidden_states=text["prompt_embeds"], return_dict=False)[0]
