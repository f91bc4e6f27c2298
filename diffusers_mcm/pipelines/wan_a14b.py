"""Text to video with the two experts of Wan 2.2 A14B."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from ..base_models.wan import WanA14B, check_boundary
from ..location import Location
from ..lora import (
    DENOISER,
    SECOND_DENOISER,
    LoRA,
    as_pair,
    by_experts,
    check_alike,
    expert_of,
    for_expert,
    pair_of,
    read_components,
    write_lora_pair,
)
from ..scheduler import MCMFlowScheduler
from ..settings import EXPERTS, HIGH_NOISE, LOW_NOISE
from .adapters import ADAPTERS_FILE
from .mcm import MCMPipeline, MCMPipelineOutput
from .request import Request, arguments
from .sole_use import one_call
from .wan import WanMCMPipeline

logger = logging.getLogger(__name__)


class WanA14BMCMPipeline(WanMCMPipeline):
    """Few-step text to video with Wan 2.2 A14B, which has two transformers.

    The first, the high-noise expert, is asked at timesteps of `boundary_ratio` times 1000 and above, the second, the
    low-noise expert, below. An MCM LoRA is a pair, and the scheduler's `boundary` the same σ: the student of the first
    expert leads there, and that of the second from there to the video.

    Args:
        vae, text_encoder, tokenizer, scheduler: As those of [`WanMCMPipeline`].
        transformer, transformer_2 ([`WanTransformer3DModel`]): The experts. One of them may be `None`, where the steps
            of the other are all that is sampled.
        boundary_ratio (`float`): The σ where they meet.
        expand_timesteps (`bool`, *optional*): Of Wan 2.2 TI2V.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model = WanA14B()
    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"
    _optional_components = ["transformer", "transformer_2"]
    _guidance_scale_2: float | None = None

    def __init__(
        self,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: T5Tokenizer,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: int | float | None = None,
    ):
        if transformer is None and transformer_2 is None:
            raise ValueError("Expected `transformer`, `transformer_2` or both; got neither.")
        check_boundary(boundary_ratio)
        super().__init__(**arguments(locals()))

    @property
    def boundary(self) -> float:
        """The σ where the experts meet."""
        return float(self.config.boundary_ratio)

    def few_step_scheduler(self) -> SchedulerMixin:
        """The pipeline's scheduler, or one in its place that samples in few steps and changes experts where they meet.

        One that is there already stays as it is; its `boundary` is `None` for LoRAs that do not stop there.
        """
        if isinstance(self.scheduler, MCMFlowScheduler):
            return self.scheduler
        return MCMFlowScheduler.from_config(super().few_step_scheduler().config, boundary=self.boundary)

    # --- sampling ----------------------------------------------------------------------------------------------------
    @one_call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        timesteps: Sequence[float] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[MCMPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = 16,
        lora_scale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_scale_2: float | None = None,
    ) -> MCMPipelineOutput | tuple:
        """Make videos.

        Args:
            num_inference_steps: 2 to 8 as a rule, for each expert makes one step at least; with one step the first
                makes all of the video. Defaults to the LoRA's recommendation, or else 4.
            guidance_scale_2: That of the second expert; by default `guidance_scale`, which has to be above 1 for
                either of the two to be guided.

        All others are those of every pipeline, see [`MCMPipeline.__call__`].

        Returns:
            [`MCMPipelineOutput`] or, without `return_dict`, a `tuple` whose first element is the videos.
        """
        return self._make_videos(**arguments(locals()))

    def _check(self, request: Request) -> None:
        super()._check(request)
        if request.guidance_scale_2 is not None and not request.guided:
            raise ValueError(
                f"`guidance_scale_2` ({request.guidance_scale_2:g}) has no effect at a `guidance_scale` of"
                f" {request.guidance_scale:g}, which switches guidance off for both experts; give one above 1."
            )

    def _set_timesteps(self, request: Request, device) -> torch.Tensor:
        boundary = self.scheduler.config.get("boundary")
        if boundary not in (None, self.boundary):
            raise ValueError(
                f"The scheduler's experts meet at a `boundary` of {boundary}, the pipeline's at a `boundary_ratio` of"
                f" {self.boundary}; they must be the same."
            )
        timesteps = super()._set_timesteps(request, device)
        self._guidance_scale_2 = request.guidance_scale_2
        asked = {HIGH_NOISE if t >= self._boundary_timestep else LOW_NOISE for t in timesteps.tolist()}
        missing = [each for each in sorted(asked) if getattr(self, self.base_model.experts[each]) is None]
        if missing:
            raise ValueError(
                f"This pipeline has no {missing[0]} expert (`{self.base_model.experts[missing[0]]}` is None), which"
                f" some of the timesteps {[round(t, 1) for t in timesteps.tolist()]} need: experts change at"
                f" {self._boundary_timestep:g}. Load it, or give `timesteps` on the other's side."
            )
        return timesteps

    @property
    def _boundary_timestep(self) -> float:
        return self.boundary * self.scheduler.config.num_train_timesteps

    def _denoiser_at(self, t: torch.Tensor) -> tuple[Any, float]:
        if t >= self._boundary_timestep:
            return self.transformer, self._guidance_scale
        second = self._guidance_scale_2
        return self.transformer_2, self._guidance_scale if second is None else second

    # --- LoRAs: one for each expert ----------------------------------------------------------------------------------
    def _read_loras(self, source: Any, load_into_transformer_2: bool | None = None, **options: Any) -> dict[str, LoRA]:
        """The LoRAs of a pair, or that for the expert that `load_into_transformer_2` says, by component."""
        pair = pair_of(source, **options)
        if pair is None:
            loras = self._read_file(source, **options)
        else:
            loras = [lora for each in pair for lora in self._read_file(each)]
        if len(loras) > 2:
            raise ValueError(f"{loras[0].source} holds both LoRAs of a pair; it goes with no other.")
        if len(loras) == 2:
            if load_into_transformer_2 is not None:
                raise ValueError("`load_into_transformer_2` is for a LoRA of one expert; got a pair for both.")
            loras = list(as_pair(loras))
        else:
            loras = [self._half(loras[0], load_into_transformer_2)]
        for lora in loras:
            if (component := self.base_model.experts[str(lora.settings.expert)]) not in self.denoisers:
                raise ValueError(f"{lora.source} is for `{component}`, and this pipeline was loaded without it.")
            if lora.settings.boundary not in (None, self.boundary):
                raise ValueError(
                    f"{lora.source} is for experts that meet at a boundary of {lora.settings.boundary}; those"
                    f" of this pipeline meet at {self.boundary}."
                )
        if len(loras) == 2:
            check_alike(*loras)
        return {self.base_model.experts[str(lora.settings.expert)]: lora for lora in loras}

    def _read_file(self, source: Any, **options: Any) -> list[LoRA]:
        """The LoRA of a file, or both; one whose keys are of `transformer_2` is for the low-noise expert."""
        # Both experts have the same modules, by which it is read.
        network = self._networks[next(iter(self.denoisers))]
        high, low = self.base_model.experts.values()
        found = read_components(source, {high: network, low: network}, **options)
        if len(found) == 2:
            return list(by_experts({DENOISER: found[high], SECOND_DENOISER: found[low]}))
        return [found[high]] if high in found else [for_expert(found[low], LOW_NOISE)]

    def _half(self, lora: LoRA, load_into_transformer_2: bool | None) -> LoRA:
        """A LoRA with the expert that it is loaded for; `ValueError` where that is the mistake of having but one."""
        said = expert_of(lora)
        if load_into_transformer_2 is None:
            what = "does not say which of the two experts it is for" if said is None else f"is for the {said} expert"
            raise ValueError(
                f"{lora.source} {what}, and there is no LoRA for the other one. Give both: a folder with"
                f" {' and '.join(f'{each}_model.safetensors' for each in EXPERTS)}, or two as (high, low). To load one"
                " for one expert alone: load_lora_weights(…, load_into_transformer_2=…), which is True for the"
                " low-noise expert."
            )
        asked = EXPERTS[bool(load_into_transformer_2)]
        if lora.settings.expert not in (None, asked):
            raise ValueError(
                f"{lora.source} is for the {lora.settings.expert} expert; `load_into_transformer_2="
                f"{load_into_transformer_2}` means the other one."
            )
        return for_expert(lora, asked)

    def _read_adapter(self, place: Location) -> dict[str, LoRA]:
        if pair_of(place) is not None:
            return self._read_loras(place)
        (lora,) = self._read_file(place)  # which was loaded for one expert alone
        return {self.base_model.experts[str(lora.settings.expert)]: lora}

    def _load_adapters(self, location: Location) -> None:
        if len(self.denoisers) == 2:
            super()._load_adapters(location)
        elif location.json(ADAPTERS_FILE) is not None:
            logger.warning("The LoRAs of %s are for two experts, of which one is loaded; they are left out.", location)

    def _write_adapter(self, folder: Path, loras: Mapping[str, LoRA]) -> None:
        experts = {component: expert for expert, component in self.base_model.experts.items()}
        if len(loras) == 2:
            named = {experts[component]: lora for component, lora in loras.items()}
            write_lora_pair(folder, named, self.base_model.denoiser_name)
        else:
            super()._write_adapter(folder, {self.base_model.denoiser_name: next(iter(loras.values()))})
