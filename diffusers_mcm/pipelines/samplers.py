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
    UniPCMultistepScheduler,
)

from ..scheduler import MCMFlowScheduler

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
    "unipc": Sampler(UniPCMultistepScheduler, options={"steps_offset": 1}),
}
FLOW_SAMPLERS = ("euler", "unipc")  # of flow matching; the first is our own scheduler without fresh noise


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


def make_scheduler(
    sampler: str, pipeline: DiffusionPipeline, timestep_spacing: str | None = None, shift: float | None = None
) -> SchedulerMixin:
    """Make a scheduler for a pipeline's network: its noise schedule and prediction type, another way of sampling.

    A pipeline that is saved and loaded again has the sampler of its base model, whatever was put in its place.

    Args:
        sampler: `"mcm"` (the pipeline's own, or that of its base model in the place of another), `"lcm"`, `"ddim"`,
            `"dpm++"`, `"euler"` or `"unipc"`; for flow-matching models such as Wan the first and the last two.
        pipeline: The [`MCMPipeline`] whose scheduler's configuration is read; it is not changed.
        timestep_spacing: For all but the first two, and not for flow matching: `"trailing"` (the default: the steps
            begin where noise is pure, on the grid of the distillation), `"leading"` (diffusers' own default for DDIM:
            a single step begins where there is almost no noise) or `"linspace"`.
        shift: Of the timesteps of flow matching, above 0 (default: that of the pipeline's scheduler, which is a
            student's; Wan itself is sampled with 3 at 480p and 5 at 720p).

    Raises:
        ValueError: for a sampler, a spacing or a shift that is unknown, or that does not go with the others or the
            base model.

    Examples:
        ```py
        >>> from diffusers_mcm import MCMPipeline, make_scheduler

        >>> pipe = MCMPipeline.from_pretrained("mcm-shapes-teacher")
        >>> pipe.scheduler = make_scheduler("ddim", pipe, "leading")
        ```
    """
    check_spacing(sampler, timestep_spacing)
    if issubclass(pipeline.base_model.scheduler_class, MCMFlowScheduler):
        return _make_flow_scheduler(sampler, pipeline, timestep_spacing, shift)
    model, own = pipeline.base_model, pipeline.scheduler
    if shift is not None:
        raise ValueError(f"expected a shift for a flow-matching model, got {shift} for a {model.name}, which has none")
    if sampler == OWN:
        return pipeline.few_step_scheduler()
    row = SAMPLERS[sampler]
    kept = {name: own.config[name] for name in (*model.noise_schedule_keys, *row.kept) if name in own.config}
    spacing = {"timestep_spacing": timestep_spacing or SPACINGS[0]} if row.spaced else {}
    return row.scheduler(**kept, **spacing, **row.options)


def _make_flow_scheduler(
    sampler: str, pipeline: DiffusionPipeline, timestep_spacing: str | None, shift: float | None
) -> SchedulerMixin:
    """That of `make_scheduler` for a model on the flow path."""
    if sampler not in (OWN, *FLOW_SAMPLERS):
        raise ValueError(
            f"expected a sampler out of {', '.join((OWN, *FLOW_SAMPLERS))} for a {pipeline.base_model.name}, got"
            f" {sampler!r}: {SAMPLERS[sampler].scheduler.__name__} samples noise schedules of betas, and that model is"
            " of flow matching"
        )
    if timestep_spacing is not None:
        raise ValueError(
            f"expected no timestep_spacing for a {pipeline.base_model.name}, got {timestep_spacing!r}: the steps of"
            " flow matching are spaced by its shift"
        )
    if shift is not None and not shift > 0:
        raise ValueError(f"expected a shift above 0, got {shift}")
    own = pipeline.few_step_scheduler()
    shift = own.config.shift if shift is None else shift
    if sampler == "unipc":
        return UniPCMultistepScheduler(
            num_train_timesteps=own.config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    if sampler == OWN and shift == own.config.shift:
        return own
    stochastic = {} if sampler == OWN else {"stochastic": False}
    return MCMFlowScheduler.from_config(own.config, shift=shift, **stochastic)


def sampler_settings(pipeline: DiffusionPipeline) -> dict[str, str | None]:
    """What to write down of how a pipeline samples: `sampler`, by its name in the table or else its class, and
    `timestep_spacing`, where it has any choice of it."""
    kind, config = type(pipeline.scheduler), pipeline.scheduler.config
    if issubclass(kind, pipeline.base_model.scheduler_class):
        euler = issubclass(kind, MCMFlowScheduler) and not config.stochastic
        return {"sampler": FLOW_SAMPLERS[0] if euler else OWN, "timestep_spacing": None}
    name = next((name for name, row in SAMPLERS.items() if row.scheduler is kind), kind.__name__)
    flow = config.get("use_flow_sigmas", False)
    spaced = not flow and (name not in SAMPLERS or SAMPLERS[name].spaced)
    return {"sampler": name, "timestep_spacing": config.get("timestep_spacing") if spaced else None}
