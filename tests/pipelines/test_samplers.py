"""The samplers that MCM is compared with, against diffusers' own pipeline on its own schedulers."""

from functools import partial

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
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
from tests.tiny_wan import SIZE, wan_components

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
    "unipc": lambda spacing: UniPCMultistepScheduler(
        **ANIMATEDIFF_SCHEDULER, timestep_spacing=spacing, steps_offset=1
    ),
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


@pytest.mark.parametrize("name, leading", [("ddim", 1), ("dpm++", 501), ("euler", 1), ("unipc", 501)])
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
    ours.scheduler = DEISMultistepScheduler(**ANIMATEDIFF_SCHEDULER, timestep_spacing="leading")
    assert sampler_settings(ours) == {"sampler": "DEISMultistepScheduler", "timestep_spacing": "leading"}
    ours.scheduler = own


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("heun", None), r"expected a sampler out of mcm, lcm, ddim, dpm\+\+, euler, unipc, got 'heun'"),
        (("ddim", "even"), "expected a timestep_spacing out of trailing, leading, linspace, got 'even'"),
        *(
            (
                (name, "leading"),
                rf"out of ddim, dpm\+\+, euler, unipc with the timestep_spacing 'leading', got {name}: a cons",
            )
            for name in ("mcm", "lcm")
        ),
    ],
)
def test_what_does_not_go_together(both, arguments, message):
    name, spacing = arguments
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, both[0], spacing)


# --- flow matching ---------------------------------------------------------------------------------------------------
@pytest.fixture
def wan():
    return WanMCMPipeline(**wan_components() | {"scheduler": MCMFlowScheduler()})


def wan_latents(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    size = dict(height=SIZE, width=SIZE, num_frames=5, output_type="latent", latents=latents)
    return pipe("a red ring", negative_prompt="blurry", guidance_scale=3.0, **size, **options).frames


@pytest.mark.parametrize("steps", [3, 50])
def test_wans_teacher_is_sampled_as_diffusers_does(wan, steps):
    stock = WanPipeline(**wan_components())  # whose UniPC has a shift of 3
    wan.scheduler = make_scheduler("unipc", wan, shift=3.0)
    assert sampler_settings(wan) == {"sampler": "unipc", "timestep_spacing": None}
    torch.testing.assert_close(
        wan_latents(wan, num_inference_steps=steps), wan_latents(stock, num_inference_steps=steps), **EXACT
    )


@pytest.mark.parametrize("steps", [4, 7, 48, 50, 100])
def test_eulers_steps_of_a_flow_are_evenly_spaced_before_the_shift(wan, steps):
    """Up to 48 on the grid of a student's distillation, and finer than that where it is left to the teacher."""
    wan.scheduler = make_scheduler("euler", wan, shift=3.0)
    assert sampler_settings(wan) == {"sampler": "euler", "timestep_spacing": None}
    stock = WanPipeline(**wan_components() | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
    points = [1 - (48 * i // steps) / 48 if steps < 48 else 1 - i / steps for i in range(steps)]
    stock.scheduler.set_timesteps = partial(stock.scheduler.set_timesteps, sigmas=points)
    ours, theirs = (wan_latents(pipe, num_inference_steps=steps) for pipe in (wan, stock))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # sums of float32 in another order, a hundred times


def test_the_few_step_sampler_takes_another_shift(wan):
    assert make_scheduler("mcm", wan) is make_scheduler("mcm", wan, shift=5.0) is wan.scheduler
    other = make_scheduler("mcm", wan, shift=8.0)
    assert type(other) is MCMFlowScheduler and (other.config.shift, other.config.stochastic) == (8.0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddim",), "expected a sampler out of mcm, euler, unipc for a wan, got 'ddim': DDIMScheduler samples noise"),
        (("unipc", "leading"), "expected no timestep_spacing for a wan, got 'leading'"),
        (("euler", None, 0.0), "expected a shift above 0, got 0.0"),
    ],
)
def test_what_does_not_go_with_a_flow(wan, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(arguments[0], wan, *arguments[1:])


def test_a_model_with_betas_has_no_shift(both):
    with pytest.raises(ValueError, match="expected a shift for a flow-matching model, got 3.0 for a animatediff"):
        make_scheduler("mcm", both[0], shift=3.0)
