"""AnimateDiff: Stable Diffusion 1.5 or a fine-tune of it, with motion modules between its layers.

A base model comes as a saved AnimateDiff pipeline, or as a Stable Diffusion repository together with a motion adapter,
which is in a repository of its own. This file is everything the package knows about the networks of that model;
`pipelines.animatediff` samples it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import MotionAdapter, SchedulerMixin, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention import FreeNoiseTransformerBlock
from torch import nn

from ..conditioning import Conditioning
from ..moved import moved
from .base import component_class
from .precision import float32_ends
from .stable_diffusion import StableDiffusionModel

ADAPTER = "motion_adapter"
IMAGE_EMBEDS = "image_embeds."  # keys of a `Conditioning` start with it, one for each IP-Adapter


class AnimateDiff(StableDiffusionModel):
    name = "animatediff"
    default_repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    extra_repositories = {ADAPTER: "guoyww/animatediff-motion-adapter-v1-5-2"}
    denoiser_classes = ("UNetMotionModel", "UNet2DConditionModel")
    guidance_range = (7.0, 8.0)
    height = 512
    width = 512
    num_frames = 16
    scheduler_defaults = {
        **StableDiffusionModel.scheduler_defaults,
        "beta_schedule": "linear",
        "steps_offset": 1,
        "clip_sample": False,
    }

    # --- loading -----------------------------------------------------------------------------------------------------
    def matches(self, model_index: Mapping[str, Any]) -> bool:
        # Stable Diffusion XL has the same class of UNet, and a second text encoder.
        return super().matches(model_index) and "text_encoder_2" not in model_index

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(".motion_modules." in name for name in module_names)

    def components_elsewhere(self, model_index: Mapping[str, Any]) -> dict[str, str]:
        return {} if has_motion(model_index) else super().components_elsewhere(model_index)

    def image_models_scheduler(self, config: Mapping[str, Any] | None) -> SchedulerMixin:
        """The sampler for a Stable Diffusion with motion modules: of its configuration only what the network predicts
        holds, for its betas (scaled linear) are the image model's, and the motion modules were trained on linear ones.
        """
        kept = {key: value for key, value in (config or {}).items() if key == "prediction_type"}
        return self.scheduler_class.from_config(self.scheduler_config(kept))

    # --- the tensors -------------------------------------------------------------------------------------------------
    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        shape = super().latent_shape(denoiser, vae, num_frames, height, width)
        longest = denoiser.config.motion_max_seq_length
        if num_frames > longest and not any(isinstance(m, FreeNoiseTransformerBlock) for m in denoiser.modules()):
            raise ValueError(
                f"`num_frames` must be at most {longest}, the most that the motion modules can tell apart, got"
                f" {num_frames}; `enable_free_noise()` samples longer clips."
            )
        return shape

    def denoise(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        **network_options,
    ) -> torch.Tensor:
        """`text["prompt_embeds"]` is `(B, length, features)`, or `(B, T, length, features)` with a text per frame;
        `image_embeds.0` and so on `(B, images, [length,] features)`, for each IP-Adapter."""
        embeds = text["prompt_embeds"]
        embeds = embeds.flatten(0, 1) if embeds.ndim == 4 else embeds.repeat_interleave(latents.shape[2], 0)
        pictures = [value for key, value in text.items() if key.startswith(IMAGE_EMBEDS)]
        if pictures:
            network_options["added_cond_kwargs"] = {"image_embeds": pictures}
        with float32_ends(denoiser):
            return denoiser(latents, timesteps, encoder_hidden_states=embeds, return_dict=False, **network_options)[0]


def has_motion(model_index: Mapping[str, Any]) -> bool:
    """Whether a repository's UNet has motion modules in it."""
    return component_class(model_index, "unet") == "UNetMotionModel"


def with_motion(unet: UNet2DConditionModel | UNetMotionModel, adapter: MotionAdapter | None) -> UNetMotionModel:
    """The UNet with the adapter's motion modules in it; with its own if there is no adapter."""
    if isinstance(unet, UNet2DConditionModel):
        if adapter is None:
            raise ValueError("A UNet2DConditionModel has no motion modules; expected a `motion_adapter` with it.")
        return UNetMotionModel.from_unet2d(unet, adapter)
    if adapter is not None:
        unet.load_motion_modules(adapter)
    return unet


def __getattr__(name: str):
    """Names that this module once held are found where they are now."""
    return moved(__name__, name, {"AnimateDiffMCMPipeline": "diffusers_mcm.pipelines"})
