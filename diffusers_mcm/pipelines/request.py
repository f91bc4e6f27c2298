"""What one call of a pipeline is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import checks

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
Texts = str | Sequence[str] | Mapping[int, str]  # a prompt, several, or one for each of some frames


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a method by name, of the `locals()` that it begins with."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


@dataclass
class Request:
    """The arguments of one call, which its steps hand on to each other; nothing of them is kept on the pipeline.

    What can be checked of them without the pipeline is checked as the request is made. Their names are those of
    [`MCMPipeline.__call__`] and of diffusers' `AnimateDiffPipeline`.
    """

    num_frames: int
    height: int
    width: int
    prompt: Texts | None = None
    negative_prompt: Texts | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    num_videos_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    guidance_scale: float = 1.0
    guidance_scale_2: float | None = None  # of the second of two experts; `None`: that of both
    eta: float | None = None  # the scheduler's own
    output_type: str = "latent"
    decode_chunk_size: int | None = None
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: list[torch.Tensor] | None = None
    lora_scale: Any = None  # a number afterwards, that in `cross_attention_kwargs` if it is there
    cross_attention_kwargs: Mapping[str, Any] | None = None
    attention_options: dict[str, Any] = field(init=False)  # what else is in there
    clip_skip: int | None = None
    callback_on_step_end: Callable | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.guidance_scale = checks.number("guidance_scale", self.guidance_scale)
        if self.guidance_scale_2 is not None:
            self.guidance_scale_2 = checks.number("guidance_scale_2", self.guidance_scale_2)
        if self.eta is not None and not 0 <= checks.number("eta", self.eta) <= 1:
            raise ValueError(f"`eta` must lie between 0 and 1, got {self.eta:g}.")
        self.num_videos_per_prompt = checks.whole_number("num_videos_per_prompt", self.num_videos_per_prompt, least=1)
        for name in ("decode_chunk_size", "num_inference_steps"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, checks.whole_number(name, value, least=1))
        if not isinstance(self.output_type, str) or self.output_type not in OUTPUT_TYPES:
            kind = checks.shown(self.output_type)
            raise ValueError(f"Unknown output_type {kind}; valid values are {', '.join(OUTPUT_TYPES)}.")
        if self.timesteps is not None:
            if self.num_inference_steps is not None:
                raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
            self.timesteps = checks.timesteps_list(self.timesteps)
        found = checks.attention_options(self.lora_scale, self.cross_attention_kwargs)
        self.lora_scale, self.attention_options = found

    @property
    def guided(self) -> bool:
        """Whether the call starts with classifier-free guidance."""
        return self.guidance_scale > 1

    def count_prompts(self) -> int:
        """How many prompts there are; `ValueError` if there are negative ones of another number."""
        several = self.prompt if self.prompt_embeds is None else self.prompt_embeds
        count = len(several) if isinstance(several, (list, tuple, torch.Tensor)) else 1
        if isinstance(self.negative_prompt, (list, tuple)) and len(self.negative_prompt) != count:
            raise ValueError(f"{len(self.negative_prompt)} negative prompts were given for {count} prompts.")
        return count
