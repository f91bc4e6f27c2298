"""The samplers that MCM is compared with, against diffusers' own pipeline on its own schedulers."""

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_mcm import (
    AnimateDiffMCMPipeline,
    MCMFlowScheduler,
    MCMScheduler,
    ModelScopeMCMPipeline,
    WanMCMPipeline,
    make_scheduler,
)
from diffusers_mcm.pipelines.samplers import SAMPLERS, SPACINGS, sampler_settings
from tests.formats.world import sample
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    EXACT,
    SCHEDULER,
    tiny_animatediff_components,
    tiny_components,
    tiny_motion_adapter,
)
from tests.tiny_wan import wan_components

# What somebody writes who samples with diffusers alone; the offset is that of the base models' repositories.
BY_HAND = {
    "lcm": lambda _: LCMScheduler(**ANIMATEDIFF_SCHEDULER),
    "ddim": lambda spacing: DDIMScheduler(
        **ANIMATEDIFF_SCHEDULER, timestep_spacing=spacing, steps_offset=1, clip_sample=False
    ),
    "dpm++": lambda spacing: DPMSolverMultistepScheduler(
        **ANIMATEDIFF_SCHEDULER, timestep_spacing=spacing, steps_offset=1
    ),
    "euler": lambda spacing: EulerDiscreteScheduler(**ANIMATEDIFF_SCHEDULER, timestep_spacing=spacing, steps_offset=1),
}
SPACED = [(name, spacing) for name, row in SAMPLERS.items() for spacing in (SPACINGS if row.spaced else [None])]


@pytest.fixture(scope="module")
def both():
    """Our pipeline, with its own sampler, and diffusers', each with networks of its own."""
    ours = AnimateDiffMCMPipeline(
        **tiny_animatediff_components() | {"scheduler": MCMScheduler(**ANIMATEDIFF_SCHEDULER)}
    )
    stock = AnimateDiffPipeline(**tiny_animatediff_components(), motion_adapter=tiny_motion_adapter())
    return ours, stock


@pytest.mark.parametrize("name, spacing", SPACED)
def test_a_sampler_is_diffusers_own(both, name, spacing):
    ours, stock = both
    own = ours.scheduler
    try:
        ours.scheduler, stock.scheduler = make_scheduler(name, ours, spacing), BY_HAND[name](spacing)
        assert sampler_settings(ours) == {"sampler": name, "timestep_spacing": spacing}
        options = dict(steps=3, guidance_scale=2.0, negative_prompt="a blue square")
        torch.testing.assert_close(sample(ours, **options), sample(stock, **options), **EXACT)
    finally:
        ours.scheduler = own


@pytest.mark.parametrize("name, leading", [("ddim", 1), ("dpm++", 501), ("euler", 1)])
def test_the_spacing_says_where_a_single_step_begins(both, name, leading):
    """At pure noise, unless it is told that it shall begin where there is less, or almost none."""
    for spacing, first in ((None, 999), ("trailing", 999), ("leading", leading)):
        scheduler = make_scheduler(name, both[0], spacing)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [first]
        assert scheduler.config.timestep_spacing == spacing or spacing is None


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_noise_schedule_is_the_networks(name):
    noise = SCHEDULER | {"beta_end": 0.015, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe = ModelScopeMCMPipeline(**tiny_components() | {"scheduler": MCMScheduler(**noise, timestep_scaling=7.0)})
    made = make_scheduler(name, pipe)
    assert {key: made.config[key] for key in noise} == noise
    assert type(pipe.scheduler) is MCMScheduler  # it is the caller who puts another there
    assert make_scheduler("mcm", pipe) is pipe.scheduler
    pipe.scheduler = made
    again = make_scheduler("mcm", pipe)
    assert type(again) is MCMScheduler and {key: again.config[key] for key in noise} == noise


def test_lcm_has_the_grid_of_the_distillation():
    own = MCMScheduler(**SCHEDULER, original_inference_steps=8)
    pipe = ModelScopeMCMPipeline(**tiny_components() | {"scheduler": own})
    for scheduler in (own, make_scheduler("lcm", pipe)):
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_scheduler_of_somebody_elses_is_told_by_its_class(both):
    ours, _ = both
    own = ours.scheduler
    assert sampler_settings(ours) == {"sampler": "mcm", "timestep_spacing": None}
    ours.scheduler = UniPCMultistepScheduler(**ANIMATEDIFF_SCHEDULER, timestep_spacing="leading")
    assert sampler_settings(ours) == {"sampler": "UniPCMultistepScheduler", "timestep_spacing": "leading"}
    ours.scheduler = own


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("heun", None), r"expected a sampler out of mcm, lcm, ddim, dpm\+\+, euler, got 'heun'"),
        (("ddim", "even"), "expected a timestep_spacing out of trailing, leading, linspace, got 'even'"),
        *(
            (
                (name, "leading"),
                rf"out of ddim, dpm\+\+, euler with the timestep_spacing 'leading', got {name}: a cons",
            )
            for name in ("mcm", "lcm")
        ),
    ],
)
def test_what_does_not_go_together(both, arguments, message):
    name, spacing = arguments
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, both[0], spacing)


def test_a_model_without_betas_has_its_own_sampler_alone():
    components = wan_components()
    pipe = WanMCMPipeline(**components | {"scheduler": MCMFlowScheduler()})
    assert make_scheduler("mcm", pipe) is pipe.scheduler
    with pytest.raises(ValueError, match="expected the sampler mcm for a .*, got 'ddim': DDIMScheduler samples noise"):
        make_scheduler("ddim", pipe)
