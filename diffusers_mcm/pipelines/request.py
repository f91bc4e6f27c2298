"""What one call of a pipeline is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import checks
from .callbacks import StepCallback

logger = logging.getLogger(__name__)


@dataclass
class Request:
    """The arguments of one call, which its steps hand on to each other; nothing of them is kept on the pipeline.

    What can be checked of them without the pipeline is checked as the request is made. Their names are those of
    [`MCMPipeline.__call__`] and of diffusers' `AnimateDiffPipeline`; `network_options` go to `BaseModel.denoise`.
    """

    num_frames: int
    height: int
    width: int
    prompt: str | Sequence[str] | Mapping[int, str] | None
    negative_prompt: str | Sequence[str] | Mapping[int, str] | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    num_videos_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    guidance_scale: float = 1.0
    eta: float | None = None  # the scheduler's own
    output_type: str = "latent"
    decode_chunk_size: int | None = None
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: list[torch.Tensor] | None = None
    lora_scale: float = 1.0
    clip_skip: int | None = None
    network_options: dict[str, Any] = field(default_factory=dict)
    callback: StepCallback | None = None

    def __post_init__(self) -> None:
        self.guidance_scale = checks.number("guidance_scale", self.guidance_scale)
        self.eta = None if self.eta is None else checks.eta(self.eta)
        videos = checks.whole_number("num_videos_per_prompt", self.num_videos_per_prompt, least=1)
        self.num_videos_per_prompt = videos
        if self.decode_chunk_size is not None:
            self.decode_chunk_size = checks.whole_number("decode_chunk_size", self.decode_chunk_size, least=1)
        checks.check_output_type(self.output_type)
        if self.num_inference_steps is not None:
            if self.timesteps is not None:
                raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
            self.num_inference_steps = checks.whole_number("num_inference_steps", self.num_inference_steps, least=1)
        if self.timesteps is not None:
            self.timesteps = checks.timesteps_list(self.timesteps)

    @property
    def guided(self) -> bool:
        """Whether the call starts with classifier-free guidance."""
        return self.guidance_scale > 1

    def count_prompts(self) -> int:
        """How many prompts there are; `ValueError` if there are negative ones of another number."""
        if self.prompt_embeds is not None:
            count = len(self.prompt_embeds)
        else:
            count = len(self.prompt) if isinstance(self.prompt, (list, tuple)) else 1
        if isinstance(self.negative_prompt, (list, tuple)) and len(self.negative_prompt) != count:
            raise ValueError(f"{len(self.negative_prompt)} negative prompts were given for {count} prompts.")
        return count

    def warn_of_an_idle_negative(self) -> None:
        """Say that a negative prompt has no effect, if one is given without guidance."""
        if not self.guided and (self.negative_prompt is not None or self.negative_prompt_embeds is not None):
            logger.warning(
                "The negative prompt has no effect at guidance_scale=%g; it needs a scale above 1.",
                self.guidance_scale,
            )
