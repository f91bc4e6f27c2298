"""ModelScope text-to-video: Stable Diffusion's UNet with temporal layers between the spatial ones.

This file is everything the package knows about that model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..pipelines.mcm import MCMPipeline
from .base import Text
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

    def load_denoiser(self, source, index, weights_of, extra_repositories, hub_options):
        return UNet3DConditionModel.from_pretrained(source, **weights_of("unet")), {}

    def recognises(self, module_names: Iterable[str]) -> bool:
        return any(name.startswith("transformer_in.") or ".temp_attentions." in name for name in module_names)

    @property
    def pipeline_class(self) -> type:
        return ModelScopeMCMPipeline

    def denoise(self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Text) -> torch.Tensor:
        with float32_ends(denoiser):
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
