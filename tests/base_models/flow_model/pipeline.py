"""Text to video with the tiny flow model."""

from __future__ import annotations

from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from diffusers_mcm import MCMPipeline

from .base_model import FlowModel


class FlowMCMPipeline(MCMPipeline):
    """Few-step text to video with the tiny flow model; a repository of `WanPipeline`'s has these components."""

    base_model = FlowModel()
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["transformer_2"]

    def __init__(
        self,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: T5Tokenizer,
        transformer: WanTransformer3DModel,
        scheduler: SchedulerMixin,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: float | None = None,
    ):
        networks = dict(vae=vae, text_encoder=text_encoder, transformer=transformer, transformer_2=transformer_2)
        sampling = dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps)
        self._set_up(**networks, **sampling, fps=fps, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
