"""The samplers that MCM is compared with: diffusers' schedulers on the noise schedule of a pipeline's network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

OWN = "mcm"  # the few-step sampler of the pipeline's base model
SPACINGS = ("trailing", "leading", "linspace")


class Sampler(NamedTuple):
    """How one of diffusers' schedulers is made.

    Attributes:
        scheduler: its class.
        spaced: whether its steps can be spaced in several ways; consistency models know one grid alone.
        kept: what it takes of the pipeline's own configuration beside the noise schedule.
        options: what it is given besides.
    """

    scheduler: Any
    spaced: bool = True
    kept: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


# An offset of 1 is what the base models' repositories say; it moves the timesteps of the leading spacing alone.
SAMPLERS = {
    "lcm": Sampler(LCMScheduler, spaced=False, kept=("original_inference_steps",)),
    "ddim": Sampler(DDIMScheduler, options={"clip_sample": False, "steps_offset": 1}),
    "dpm++": Sampler(DPMSolverMultistepScheduler, options={"algorithm_type": "dpmsolver++", "steps_offset": 1}),
    "euler": Sampler(EulerDiscreteScheduler, options={"steps_offset": 1}),
}


def check_spacing(sampler: str | None, timestep_spacing: str | None) -> None:
    """`ValueError` unless the sampler, if one is named, is a known one whose steps can be spaced as they shall be."""
    if sampler not in (None, OWN, *SAMPLERS):
        raise ValueError(f"expected a sampler out of {', '.join((OWN, *SAMPLERS))}, got {sampler!r}")
    if timestep_spacing is None:
        return
    if timestep_spacing not in SPACINGS:
        raise ValueError(f"expected a timestep_spacing out of {', '.join(SPACINGS)}, got {timestep_spacing!r}")
    if sampler not in SAMPLERS or not SAMPLERS[sampler].spaced:
        spaced = ", ".join(name for name, row in SAMPLERS.items() if row.spaced)
        raise ValueError(
            f"expected a sampler out of {spaced} with the timestep_spacing {timestep_spacing!r}, got"
            f" {sampler or 'none'}: a consistency model has the grid of its distillation. Name one of these, or leave"
            " the spacing out"
        )


def make_scheduler(sampler: str, pipeline: DiffusionPipeline, timestep_spacing: str | None = None) -> SchedulerMixin:
    """Make a scheduler for a pipeline's network: its noise schedule and prediction type, another way of sampling.

    A pipeline that is saved and loaded again has the sampler of its base model, whatever was put in its place.

    Args:
        sampler: `"mcm"` (the pipeline's own, or that of its base model in the place of another), `"lcm"`, `"ddim"`,
            `"dpm++"` or `"euler"`.
        pipeline: The [`MCMPipeline`] whose scheduler's configuration is read; it is not changed.
        timestep_spacing: For the last three: `"trailing"` (the default: the steps begin where noise is pure, on the
            grid of the distillation), `"leading"` (diffusers' own default for DDIM: a single step begins where there
            is almost no noise) or `"linspace"`.

    Raises:
        ValueError: for a sampler or a spacing that is unknown, or that does not go with the other or the base model.

    Examples:
        ```py
        >>> from diffusers_mcm import MCMPipeline, make_scheduler

        >>> pipe = MCMPipeline.from_pretrained("mcm-shapes-teacher")
        >>> pipe.scheduler = make_scheduler("ddim", pipe, "leading")
        ```
    """
    check_spacing(sampler, timestep_spacing)
    model, own = pipeline.base_model, pipeline.scheduler
    if sampler == OWN:
        return pipeline.few_step_scheduler()
    row = SAMPLERS[sampler]
    if "beta_schedule" not in model.noise_schedule_keys:
        raise ValueError(
            f"expected the sampler {OWN} for a {model.name}, got {sampler!r}: {row.scheduler.__name__} samples noise"
            f" schedules of betas, and that model's is told by {', '.join(model.noise_schedule_keys)}"
        )
    kept = {name: own.config[name] for name in (*model.noise_schedule_keys, *row.kept) if name in own.config}
    spacing = {"timestep_spacing": timestep_spacing or SPACINGS[0]} if row.spaced else {}
    return row.scheduler(**kept, **spacing, **row.options)


def sampler_settings(pipeline: DiffusionPipeline) -> dict[str, str | None]:
    """What to write down of how a pipeline samples: `sampler`, by its name in the table or else its class, and
    `timestep_spacing`, where it has any choice of it."""
    kind = type(pipeline.scheduler)
    if issubclass(kind, pipeline.base_model.scheduler_class):
        return {"sampler": OWN, "timestep_spacing": None}
    name = next((name for name, row in SAMPLERS.items() if row.scheduler is kind), kind.__name__)
    spaced = name not in SAMPLERS or SAMPLERS[name].spaced
    return {"sampler": name, "timestep_spacing": pipeline.scheduler.config.get("timestep_spacing") if spaced else None}
