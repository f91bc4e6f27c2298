"""What a run takes from its base model where its flags say nothing."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..base_models import BASE_MODELS, BaseModel
from .config import TrainingConfig


def with_base_defaults(
    config: TrainingConfig, base: BaseModel, index: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """The configuration with what the base model decides, where it is not given; what is filled in stays.

    The teacher's own `fps`, if its `model_index.json` (`index`) has one, comes before that of all models of its kind.
    Raises ValueError for a flag that has no meaning for this base model.
    """
    _check(config, base)
    own: dict[str, Any] = {name: getattr(base, name) for name in ("num_solver_steps", "fps", "negative_prompt")}
    own |= base.student_settings
    if fps := (index or {}).get("fps"):
        own["fps"] = fps
    taken = {name: value for name, value in own.items() if getattr(config, name) is None}
    if config.frame_interval is None and config.data_fps is None:
        by_time = base.data_fps is not None
        taken |= {"data_fps": fps or base.data_fps} if by_time else {"frame_interval": base.frame_interval}
    if config.cache_latents is not None and config.windows_per_clip is None:
        taken["windows_per_clip"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of was said when the configuration was made
        return dataclasses.replace(config, **taken)


def student_settings(config: TrainingConfig, base: BaseModel) -> dict[str, float]:
    """What of the configuration decides the path and the sampler of the student."""
    given = {name: getattr(config, name) for name in base.student_settings}
    return {**base.student_settings, **{name: value for name, value in given.items() if value is not None}}


def _check(config: TrainingConfig, base: BaseModel) -> None:
    if base.experts and config.expert is None:
        raise ValueError(
            f"A {base.name} has two experts, each of which is distilled by itself: say which with --expert"
            f" {' or '.join(base.experts)}."
        )
    if config.expert is not None and not base.experts:
        raise ValueError(f"--expert {config.expert}: a {base.name} has one denoiser and no experts.")
    if config.frame_decoder not in base.frame_decoders:
        known = ", ".join(base.frame_decoders)
        raise ValueError(
            f"--frame_decoder {config.frame_decoder} is none that a {base.name} has; it decodes frames as: {known}."
        )
    defaults = {entry.name: entry.default for entry in dataclasses.fields(config)}
    for name in sorted({name for model in BASE_MODELS.values() for name in model.student_settings}):
        value = getattr(config, name)
        if name not in base.student_settings and value not in (None, defaults[name]):
            known = ", ".join(f"--{each}" for each in base.student_settings)
            raise ValueError(
                f"--{name} {value:g} has no effect on a {base.name}, whose noise path has no such thing; it has"
                f" {known}."
            )
