"""`MCMFlowScheduler` against the formulas of the flow path and diffusers' own schedulers."""

import json
import logging

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_mcm.consistency import FlowPath
from diffusers_mcm.scheduler import MCMFlowScheduler

SHAPE = (2, 3, 2, 4, 4)
WANS = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)  # as its repository says


def latents(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, t):
    """Any smooth function of both will do."""
    return torch.sin(3 * x) + x * float(t) / 700


def sample(scheduler, x, generator=None, model=network):
    for t in scheduler.timesteps:
        options = {} if generator is None else {"generator": generator}
        x = scheduler.step(model(x, t), t, x, **options, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [1000]),
        (2, [1000, 2500 / 3]),
        (4, [1000, 937.5, 2500 / 3, 625]),
        (8, [1000, 972.2222, 937.5, 892.8571, 833.3333, 750, 625, 416.6667]),
    ],
)
def test_the_steps_are_those_of_the_shifted_grid(steps, timesteps):
    scheduler = MCMFlowScheduler()
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(timesteps, dtype=torch.float32))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*timesteps, 0], dtype=torch.float32) / 1000)
    assert set(scheduler.timesteps.tolist()) <= set(FlowPath(5.0).solver_timesteps(48).tolist())
    assert scheduler.num_inference_steps == steps and scheduler.timesteps.dtype == torch.float32


def test_a_student_of_points_on_no_grid_visits_them(tmp_path, caplog):
    """As those of FastWan, also once it was saved; another number of steps is left to the shifted grid."""
    MCMFlowScheduler(shift=8.0, trained_timesteps=[1000, 757, 522]).save_pretrained(tmp_path)
    scheduler = MCMFlowScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [1000, 757, 522]
    scheduler.set_timesteps(timesteps=[757, 522])
    assert not caplog.records
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000, 8000 / 9]))
    with pytest.raises(ValueError, match=r"`trained_timesteps` must be descending; got \[522, 757\]"):
        MCMFlowScheduler(trained_timesteps=[522, 757])


@pytest.mark.parametrize("steps", [49, 50, 100])
def test_eulers_steps_may_be_finer_than_the_grid(steps):
    scheduler = MCMFlowScheduler(shift=3.0, stochastic=False)
    scheduler.set_timesteps(steps)
    u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    torch.testing.assert_close(scheduler.timesteps, (3000 * u / (1 + 2 * u)).float())


def test_points_can_be_given_as_timesteps_or_sigmas():
    points = {"timesteps": [1000, 937.5, 625], "sigmas": [1.0, 0.9375, 0.625]}
    found = []
    for name, values in points.items():
        scheduler = MCMFlowScheduler()
        scheduler.set_timesteps(**{name: values})
        found.append(scheduler)
        assert scheduler.timesteps.tolist() == points["timesteps"]
        assert scheduler.sigmas.tolist() == [*points["sigmas"], 0]
    assert torch.equal(*(sample(each, latents(), torch.Generator().manual_seed(3)) for each in found))


def test_points_that_no_student_learnt_are_told(caplog):
    scheduler = MCMFlowScheduler()
    with caplog.at_level(logging.WARNING):
        scheduler.set_timesteps(sigmas=[1.0, 0.9375, 0.51])
    assert "timesteps [510.0] are not on the grid of distillation" in caplog.text


def test_fresh_noise_is_added_to_what_was_predicted():
    scheduler, x = MCMFlowScheduler(), latents(dtype=torch.float64)
    scheduler.set_timesteps(4)
    v, noise = network(x, 1000), torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    output = scheduler.step(v, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(output.denoised, x - v)
    torch.testing.assert_close(output.prev_sample, 0.0625 * (x - v) + 0.9375 * noise)
    for t in scheduler.timesteps[1:]:
        output = scheduler.step(v, t, x)
    torch.testing.assert_close(output.prev_sample, x - 0.625 * v)  # nothing is added after the last
    assert torch.equal(output.prev_sample, output.denoised)


def test_one_step_is_the_same_in_both_modes():
    results = []
    for stochastic in (True, False):
        scheduler = MCMFlowScheduler(stochastic=stochastic)
        scheduler.set_timesteps(1)
        results.append(sample(scheduler, latents()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_without_noise_it_steps_as_unipc_of_order_one(steps, shift):
    """UniPC makes timesteps of its own, whole numbers; here both are given the same σ."""
    ours = MCMFlowScheduler(shift=shift, stochastic=False)
    theirs = UniPCMultistepScheduler(**WANS, solver_order=1, disable_corrector=list(range(steps)))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    # at σ = 1 their logarithm of 1 − σ is infinite, hence theirs of 1 − 1e-6
    ours.sigmas[0] = theirs.sigmas[0] = 1 - 1e-6
    theirs.sigmas[1:] = ours.sigmas[1:]
    x = y = latents(dtype=torch.float64)
    for mine, his in zip(ours.timesteps, theirs.timesteps, strict=True):
        v = network(x, mine)
        x, y = ours.step(v, mine, x).prev_sample, theirs.step(v, his, y).prev_sample
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_without_noise_it_steps_as_euler():
    ours, theirs = MCMFlowScheduler(stochastic=False), FlowMatchEulerDiscreteScheduler(shift=1.0)
    ours.set_timesteps(8)
    theirs.set_timesteps(sigmas=ours.sigmas[:-1].tolist())
    x = latents()
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=1e-5)


def test_half_types_are_stepped_in_float32():
    scheduler, x = MCMFlowScheduler(), latents(dtype=torch.bfloat16)
    scheduler.set_timesteps(4)
    v = latents(1, torch.bfloat16)
    half = scheduler.step(v, 1000.0, x, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    exact = scheduler.step(v.float(), 1000.0, x.float(), generator=torch.Generator().manual_seed(0))
    assert half.prev_sample.dtype == torch.bfloat16
    assert torch.equal(half.prev_sample, exact.prev_sample.to(torch.bfloat16))
    mixed = MCMFlowScheduler()  # a half-precision network and float32 latents, as in `WanPipeline`
    mixed.set_timesteps(4)
    assert mixed.step(v, 1000.0, x.float()).prev_sample.dtype == torch.float32


def test_sampling_may_begin_within_the_schedule():
    scheduler, x = MCMFlowScheduler(stochastic=False), latents()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert (scheduler.begin_index, scheduler.step_index) == (2, None)
    first = scheduler.step(x, scheduler.timesteps[2], x).prev_sample
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.step(x, scheduler.timesteps[2], x).prev_sample, first)


def test_noise_is_added_along_the_path():
    x, noise = latents(), latents(1)
    noisy = MCMFlowScheduler().add_noise(x, noise, torch.tensor([250.0]))
    torch.testing.assert_close(noisy, 0.75 * x + 0.25 * noise)
    assert MCMFlowScheduler().scale_model_input(x, 1000) is x and len(MCMFlowScheduler()) == 1000


# --- its configuration -----------------------------------------------------------------------------------------------
def test_the_configuration_is_saved_and_read(tmp_path):
    MCMFlowScheduler(shift=8.0, original_inference_steps=40, stochastic=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    own = dict(num_train_timesteps=1000, shift=8.0, original_inference_steps=40, stochastic=False, boundary=None)
    own["trained_timesteps"] = None
    assert {key: value for key, value in saved.items() if key[0] != "_"} == own
    again = MCMFlowScheduler.from_pretrained(tmp_path)
    assert {key: value for key, value in again.config.items() if key[0] != "_"} == own
    copy = MCMFlowScheduler.from_config(again.config, shift=3.0)
    assert (copy.config.shift, copy.config.stochastic) == (3.0, False)


@pytest.mark.parametrize("named", [True, False])
def test_what_a_later_version_adds_does_not_cost_the_rest(named, caplog):
    config = dict(MCMFlowScheduler(shift=8.0, boundary=0.875).config) | {"added_later": 1}
    if named:
        config |= {"_class_name": "MCMFlowScheduler", "_diffusers_version": "9.0"}
    with caplog.at_level("WARNING"):
        scheduler = MCMFlowScheduler.from_config(config)
    assert (scheduler.config.shift, scheduler.config.boundary) == (8.0, 0.875)
    assert "added_later" in caplog.text
    part = MCMFlowScheduler.from_config({"_class_name": "MCMFlowScheduler", "shift": 3.0, "added_later": 1})
    assert part.config.shift == 3.0
    assert MCMFlowScheduler.from_config(config | {"_class_name": "UniPCMultistepScheduler"}).config.shift == 5.0


@pytest.mark.parametrize(
    "teachers",
    [UniPCMultistepScheduler(**WANS), FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_nothing_of_the_teachers_way_of_sampling_is_taken_over(teachers, tmp_path):
    teachers.save_pretrained(tmp_path)
    for config in (teachers.config, type(teachers).load_config(tmp_path)):
        scheduler = MCMFlowScheduler.from_config(config)
        content = {key for key in json.loads(scheduler.to_json_string()) if key[0] != "_"}
        own = {"num_train_timesteps", "shift", "original_inference_steps", "stochastic", "boundary"}
        assert content == own | {"trained_timesteps"}
        assert scheduler.config.shift == 5.0


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `num_inference_steps`, `timesteps` and `sigmas`; got num_inference_steps=None"),
        (dict(timesteps=[1000], sigmas=[1.0]), r"got num_inference_steps=None, timesteps=\[1000\], sigmas=\[1.0\]"),
        (dict(num_inference_steps=0), "an integer from 1 to the 48 steps of the distillation grid .* got 0"),
        (dict(num_inference_steps=49), "an integer from 1 to the 48 steps of the distillation grid .* got 49"),
        (dict(timesteps=[1000, 0]), r"`timesteps` must be numbers above 0 and at most 1000; got \[1000, 0\]"),
        (dict(sigmas=[937.5]), r"`sigmas` must be numbers above 0 and at most 1; got \[937.5\]"),
        (dict(sigmas=[]), r"`sigmas` must be numbers above 0 and at most 1; got \[\]"),
        (dict(timesteps=[625, 1000]), r"`timesteps` must be descending; got \[625, 1000\]"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MCMFlowScheduler().set_timesteps(**options)


def test_a_grid_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="shift must be a positive number .* got 0"):
        MCMFlowScheduler(shift=0)
    with pytest.raises(ValueError, match="`original_inference_steps` must be a positive integer; got 0"):
        MCMFlowScheduler(original_inference_steps=0)


def test_a_step_that_makes_no_sense_is_refused():
    scheduler, x = MCMFlowScheduler(), latents()
    with pytest.raises(ValueError, match="`step` needs a schedule: call `set_timesteps` first"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"Timestep 937.5 is not one of the schedule's: \[1000.0\]"):
        scheduler.step(x, 937.5, x)
    with pytest.raises(ValueError, match=r"`model_output` must have the shape of `sample`, .*; got \(1, 3, 2, 4, 4\)"):
        scheduler.step(x[:1], 1000.0, x)
    scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="All 1 steps of the schedule have been taken; call `set_timesteps`"):
        scheduler.step(x, 1000.0, x)
