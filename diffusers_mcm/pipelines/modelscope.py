"""Text to video with ModelScope."""

from __future__ import annotations

from diffusers import AutoencoderKL, SchedulerMixin, UNet3DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..base_models.modelscope import ModelScope
from .mcm import MCMPipeline
from .request import arguments


class ModelScopeMCMPipeline(MCMPipeline):
    """Few-step text to video with ModelScope.

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
        fps: int | float | None = None,
    ):
        self._set_up(**arguments(locals()))
