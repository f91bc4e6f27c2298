"""AnimateDiff: Stable Diffusion 1.5 or a fine-tune of it, with motion modules between its layers.

A base model comes as a saved AnimateDiff pipeline, or as a Stable Diffusion repository together with a motion adapter,
which is in a repository of its own. This file is everything the package knows about that model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    MotionAdapter,
    SchedulerMixin,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .. import hub
from ..pipelines.loading import HUB_OPTIONS
from ..pipelines.mcm import MCMPipeline
from ..scheduler import MCMScheduler
from .base import Text
from .stable_diffusion import StableDiffusionModel

ADAPTER = "motion_adapter"


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

    def load_denoiser(self, source, index, part, dtype, extra_repositories, hub_options):
        adapter, origin = None, extra_repositories.get(ADAPTER)
        if _has_motion(index):
            unet = UNetMotionModel.from_pretrained(source, dtype=dtype, **part("unet"))
        else:
            unet = UNet2DConditionModel.from_pretrained(source, dtype=dtype, **part("unet"))
            if origin is None and _has_adapter(index):
                adapter = MotionAdapter.from_pretrained(source, dtype=dtype, **part(ADAPTER))
            else:
                origin = origin or self.extra_repositories[ADAPTER]
        if origin is not None:
            adapter = load_motion_adapter(origin, dtype, **hub_options)
        return with_motion(unet, adapter), {} if origin is None else {ADAPTER: origin}

    def own_schedule(self, index: Mapping[str, Any], config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """An AnimateDiff pipeline's own; of a Stable Diffusion repository only what its network predicts, for its
        betas (scaled linear) are those of the image model, and the motion modules were trained on linear ones."""
        if config is None or _is_animatediff(index):
            return config
        return {key: config[key] for key in ("prediction_type",) if key in config}

    @property
    def pipeline_class(self) -> type:
        return AnimateDiffMCMPipeline

    # --- the tensors -------------------------------------------------------------------------------------------------
    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Text, **network_options
    ) -> torch.Tensor:
        """`text["prompt_embeds"]` is `(B, length, features)`, or `(B, T, length, features)` with a text per frame."""
        embeds = text["prompt_embeds"]
        embeds = embeds.flatten(0, 1) if embeds.ndim == 4 else embeds.repeat_interleave(latents.shape[2], 0)
        return denoiser(latents, timesteps, encoder_hidden_states=embeds, return_dict=False, **network_options)[0]


def _has_motion(model_index: Mapping[str, Any]) -> bool:
    return (model_index.get("unet") or [None, None])[1] == "UNetMotionModel"


def _has_adapter(model_index: Mapping[str, Any]) -> bool:
    return (model_index.get(ADAPTER) or [None, None])[1] is not None


def _is_animatediff(model_index: Mapping[str, Any]) -> bool:
    """As opposed to a Stable Diffusion repository."""
    return _has_motion(model_index) or _has_adapter(model_index)


def load_motion_adapter(source: MotionAdapter | str | os.PathLike, dtype: torch.dtype, **options) -> MotionAdapter:
    """A motion adapter as it is, or from a folder or a repository on the Hub."""
    if isinstance(source, MotionAdapter):
        return source
    return MotionAdapter.from_pretrained(hub.resolve(source), dtype=dtype, **options)


def with_motion(unet: UNet2DConditionModel | UNetMotionModel, adapter: MotionAdapter | None) -> UNetMotionModel:
    """The UNet with the adapter's motion modules in it; with its own if there is no adapter."""
    if isinstance(unet, UNet2DConditionModel):
        if adapter is None:
            raise ValueError("A UNet2DConditionModel has no motion modules; expected a `motion_adapter` with it.")
        return UNetMotionModel.from_unet2d(unet, adapter)
    if adapter is not None:
        unet.load_motion_modules(adapter)
    return unet


class AnimateDiffMCMPipeline(MCMPipeline, AnimateDiffPipeline):
    """
    Few-step text to video with AnimateDiff.

    Args:
        vae ([`AutoencoderKL`]): Encodes and decodes single frames.
        text_encoder ([`CLIPTextModel`]), tokenizer ([`CLIPTokenizer`]): Encode the prompt.
        unet ([`UNetMotionModel`] or [`UNet2DConditionModel`]): The denoiser, or the one to put motion modules in.
        scheduler ([`MCMScheduler`]): Any scheduler of diffusers works too, for comparison.
        motion_adapter ([`MotionAdapter`], *optional*): Motion modules. Copied into the UNet, and not kept.
        feature_extractor, image_encoder (*optional*): Encode the pictures for an IP-Adapter.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model = AnimateDiff()

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel | UNetMotionModel,
        scheduler: SchedulerMixin,
        motion_adapter: MotionAdapter | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: float | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=with_motion(unet, motion_adapter),
            motion_adapter=None,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        sampling = dict(
            height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, fps=fps
        )
        self._set_up(sampling, vae=vae, text_encoder=text_encoder, unet=self.unet, image_encoder=image_encoder)

    @classmethod
    def _load_components(cls, source: str, index: Mapping[str, Any], recorded: Mapping[str, str], **options):
        where = {key: options[key] for key in HUB_OPTIONS if key in options}
        complete = isinstance(options.get("unet"), UNetMotionModel) or _has_motion(index)
        adapter = options.pop(ADAPTER, None)
        if adapter is None and not complete and not _has_adapter(index):
            adapter = recorded.get(ADAPTER) or cls.base_model.extra_repositories[ADAPTER]
        if not _is_animatediff(index) and "scheduler" not in options:
            found = dict(where, revision=options.get("revision"), subfolder="scheduler")
            config = cls.base_model.own_schedule(index, hub.read_json(source, "scheduler_config.json", **found))
            options["scheduler"] = MCMScheduler.from_config(cls.base_model.scheduler_config(config))
        if adapter is not None:
            adapter = load_motion_adapter(adapter, options["dtype"], **where)
        if adapter is not None or complete:
            options[ADAPTER] = None if complete else adapter  # what is in the repository need not be read
        pipeline = super()._load_components(source, index, recorded, **options)
        if complete and adapter is not None:
            pipeline.unet.load_motion_modules(adapter)
        return pipeline
