"""`MCMScheduler` against diffusers' `LCMScheduler` and closed forms, its errors, saving and loading."""

import inspect
import json
import logging as std_logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import diffusers_mcm.scheduler as scheduler_module
from diffusers_mcm.scheduler import MCMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 4, 3, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(seed=0, dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def network(sample, timestep):
    """A stand-in that depends on both of its inputs."""
    return (0.3 * sample + timestep / 1000).sin()


def sample_with(scheduler, dtype=torch.float32, generator=None, sample=None):
    """Every tensor that a whole sampling run gives."""
    generator = seeded(1) if generator is None else generator
    sample = latents(dtype=dtype) if sample is None else sample
    tensors = []
    for t in scheduler.timesteps:
        output = scheduler.step(network(sample, t), t, sample, generator=generator)
        sample = output.prev_sample
        tensors += [output.prev_sample, output.denoised]
    return tensors


def identical(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def pair(**config):
    """Our scheduler with its own defaults, and diffusers' told to use them."""
    return MCMScheduler(**config), LCMScheduler(**{"timestep_scaling": 4.0, **config})


# --- the same as LCMScheduler, bit for bit


class InFloat32:
    """A scheduler that is shown half-precision tensors as float32 ones; each of its results is rounded once."""

    def __init__(self, scheduler, dtype):
        self.scheduler, self.dtype, self.timesteps = scheduler, dtype, scheduler.timesteps

    def step(self, model_output, timestep, sample, **options):
        output = self.scheduler.step(model_output.float(), timestep, sample.float(), **options)
        return type(output)(**{name: value.to(self.dtype) for name, value in output.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling_is_bit_identical_to_lcm(steps, prediction_type, dtype):
    """In float32; of half types LCM rounds every intermediate result, and ours none."""
    ours, theirs = pair(prediction_type=prediction_type)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    results = sample_with(ours, dtype), sample_with(InFloat32(theirs, dtype), dtype)
    assert results[0][-1].dtype == dtype and torch.isfinite(results[0][-1]).all()
    assert identical(*results)


def test_a_half_precision_step_costs_x0_no_more_than_one_rounding():
    """At the last timestep x̂_0 is a thousand times the rounding of what it is the difference of; LCM shows it."""
    ours, theirs = pair()
    sample, output = latents(1, torch.bfloat16), latents(2, torch.bfloat16)
    errors = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1)
        exact = scheduler.step(output.double(), 999, sample.double()).denoised
        scheduler.set_timesteps(1)
        error = (scheduler.step(output, 999, sample).denoised.double() - exact).abs()
        errors.append(float((error / exact.abs().clamp(min=1)).max()))
    assert errors[0] < 2**-8 < 4 * 2**-8 < errors[1]


def test_a_float32_output_may_go_with_half_latents():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(1)
    result = scheduler.step(latents(2), 999, latents(1, torch.bfloat16))
    assert result.prev_sample.dtype == result.denoised.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.01 + 0.0001 * i for i in range(100)], "num_train_timesteps": 100},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        {"thresholding": True, "prediction_type": "v_prediction"},
        {"timestep_scaling": 7.0},
        {"original_inference_steps": 25},
        {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"},
    ],
    ids=lambda config: ",".join(config),
)
def test_every_setting_means_what_it_means_to_lcm(config):
    ours, theirs = pair(**config)
    for mine, yours in [(ours.betas, theirs.betas), (ours.alphas_cumprod, theirs.alphas_cumprod)]:
        assert torch.equal(mine, yours)
    assert torch.equal(ours.final_alpha_cumprod, theirs.final_alpha_cumprod)
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    assert identical(sample_with(ours), sample_with(theirs))
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    half = torch.float16
    assert identical(sample_with(ours, half), sample_with(InFloat32(theirs, half), half))


@pytest.mark.parametrize("original_inference_steps", [None, 8, 30, 1000])
def test_timesteps_equal_those_of_lcm_for_every_number_of_steps(original_inference_steps):
    ours, theirs = pair()
    for steps in range(1, min(original_inference_steps or 50, 60) + 1):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps, original_inference_steps=original_inference_steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.timesteps.dtype == theirs.timesteps.dtype
        assert ours.num_inference_steps == theirs.num_inference_steps


def test_four_steps_are_a_quarter_of_the_grid_apart():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_strength_equals_that_of_lcm(strength):
    ours, theirs = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4, strength=strength)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert identical(sample_with(ours), sample_with(theirs))


def test_explicit_timesteps_equal_those_of_lcm():
    ours, theirs = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[999, 499, 19])
    assert ours.timesteps.tolist() == [999, 499, 19]
    assert ours.custom_timesteps
    assert identical(sample_with(ours), sample_with(theirs))
    ours.set_timesteps(2)
    assert not ours.custom_timesteps


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_explicit_timesteps_come_in_any_sequence(kind):
    scheduler = MCMScheduler()
    scheduler.set_timesteps(timesteps=kind([999, 499]))
    assert scheduler.timesteps.tolist() == [999, 499]
    assert scheduler.num_inference_steps == 2


def test_no_noise_after_the_last_step_of_shortened_explicit_timesteps():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
    assert scheduler.timesteps.tolist() == [499, 259]
    tensors = sample_with(scheduler)
    assert torch.equal(tensors[-2], tensors[-1])


def test_a_python_integer_is_a_timestep_too():
    ours, theirs = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(2)
    arguments = (latents(1), 999, latents())
    assert identical(
        ours.step(*arguments, generator=seeded(), return_dict=False),
        theirs.step(*arguments, generator=seeded(), return_dict=False),
    )


def test_a_timestep_of_one_element_is_a_timestep_too():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(1)
    expected = scheduler.step(latents(1), 999, latents()).prev_sample
    scheduler.set_timesteps(1)
    result = scheduler.step(latents(1), torch.tensor([999]), latents()).prev_sample
    assert result.shape == SHAPE
    torch.testing.assert_close(result, expected)


def test_one_generator_per_sample_makes_samples_independent_of_their_batch():
    ours, theirs = pair()
    runs = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        runs.append(sample_with(scheduler, generator=[seeded(5), seeded(6)]))
    assert identical(*runs)
    ours.set_timesteps(4)
    alone = sample_with(ours, generator=[seeded(6)], sample=latents()[1:])
    assert torch.equal(alone[-1], runs[0][-1][1:])


def test_begin_index_starts_within_the_schedule():
    ours, theirs = pair()
    runs = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        sample, generator = latents(), seeded()
        for t in scheduler.timesteps[2:]:
            sample = scheduler.step(network(sample, t), t, sample, generator).prev_sample
        runs.append(sample)
        assert (scheduler.begin_index, scheduler.step_index) == (2, 4)
    assert torch.equal(*runs)
    ours.set_timesteps(4)
    assert ours.begin_index is None and ours.step_index is None


# --- closed forms


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_gives_the_clean_sample_back(prediction_type):
    scheduler = MCMScheduler(prediction_type=prediction_type)
    clean, noise = latents(1), latents(2)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    noisy = scheduler.add_noise(clean, noise, t[None])
    output = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, t[None]),
        "sample": clean,
    }[prediction_type]
    torch.testing.assert_close(scheduler.step(output, t, noisy).denoised, clean, atol=1e-4, rtol=1e-4)


def test_next_sample_is_the_denoised_one_with_fresh_noise():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    output = scheduler.step(latents(1), scheduler.timesteps[0], latents(), generator=seeded(3))
    noise = latents(3)
    expected = scheduler.add_noise(output.denoised, noise, scheduler.timesteps[1:])
    assert torch.equal(output.prev_sample, expected)
    last = scheduler.step(latents(1), scheduler.timesteps[1], output.prev_sample, generator=seeded(3))
    assert torch.equal(last.prev_sample, last.denoised)


def test_boundary_scalings_keep_clean_samples():
    scheduler = MCMScheduler()
    assert scheduler.get_scalings_for_boundary_condition_discrete(0) == (1.0, 0.0)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(19)
    assert c_skip == pytest.approx(0.25 / (76**2 + 0.25))
    assert c_out == pytest.approx(76 / (76**2 + 0.25) ** 0.5)


def test_previous_timestep_follows_the_schedule():
    scheduler = MCMScheduler()
    assert scheduler.previous_timestep(10) == 9
    scheduler.set_timesteps(4)
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [759, 499, 259, -1]


# --- adding noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_and_velocity_are_bit_identical_to_lcm(dtype):
    ours, theirs = pair()
    timesteps = torch.tensor([0, 999])
    arguments = (latents(1, dtype), latents(2, dtype), timesteps)
    assert identical([ours.add_noise(*arguments)], [theirs.add_noise(*arguments)])
    assert identical([ours.get_velocity(*arguments)], [theirs.get_velocity(*arguments)])
    every = torch.arange(1000)
    arguments = (latents(1, dtype, (1000, 3)), latents(2, dtype, (1000, 3)), every)
    assert identical([ours.add_noise(*arguments)], [theirs.add_noise(*arguments)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_noised_in_float32(dtype):
    scheduler = MCMScheduler()
    clean, noise, timesteps = latents(1, dtype), latents(2, dtype), torch.tensor([0, 500])
    expected = scheduler.add_noise(clean.float(), noise.float(), timesteps).to(dtype)
    assert identical([scheduler.add_noise(clean, noise, timesteps)], [expected])
    expected = scheduler.get_velocity(clean.float(), noise.float(), timesteps).to(dtype)
    assert identical([scheduler.get_velocity(clean, noise, timesteps)], [expected])
    # At t = 0 there is a little noise (σ_0 = 0.029), which arithmetic in bfloat16 would lose.
    assert not torch.equal(
        scheduler.add_noise(torch.zeros_like(clean), noise, timesteps)[0], torch.zeros_like(noise[0])
    )


def test_one_timestep_serves_a_whole_batch():
    scheduler = MCMScheduler()
    one = scheduler.add_noise(latents(1), latents(2), torch.tensor([300]))
    assert torch.equal(one, scheduler.add_noise(latents(1), latents(2), torch.tensor([300, 300])))


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `num_inference_steps` and `timesteps`"),
        ({"num_inference_steps": 4, "timesteps": [999]}, "exactly one of `num_inference_steps` and `timesteps`"),
        ({"num_inference_steps": 51}, "`num_inference_steps` is 51, but the distillation grid has only 50 steps"),
        ({"num_inference_steps": 5, "strength": 0.08}, "`num_inference_steps` is 5, .* has only 4 steps"),
        ({"num_inference_steps": 0}, "must be a positive integer; got 0"),
        ({"num_inference_steps": -1}, "must be a positive integer; got -1"),
        ({"num_inference_steps": 2.5}, "must be a positive integer; got 2.5"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "from 1 to the 1000 .* got 1001"),
        ({"num_inference_steps": 4, "strength": 0}, "`strength` must be above 0 and at most 1; got 0"),
        ({"num_inference_steps": 4, "strength": 1.5}, "`strength` must be above 0 and at most 1; got 1.5"),
        ({"timesteps": []}, r"at least one integer; got \[\]"),
        ({"timesteps": [999.5]}, r"at least one integer; got \[999.5\]"),
        ({"timesteps": [499, 999]}, r"must be descending; got \[499, 999\]"),
        ({"timesteps": [999, 999]}, "must be descending"),
        ({"timesteps": [1000, 500]}, r"must lie in 0..999; got \[1000, 500\]"),
        ({"timesteps": [500, -1]}, r"must lie in 0..999; got \[500, -1\]"),
        ({"timesteps": [999], "strength": 0.5}, "leaves none of the timesteps"),
    ],
)
def test_unusable_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MCMScheduler().set_timesteps(**arguments)


def test_a_refused_schedule_leaves_the_old_one():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError):
        scheduler.set_timesteps(51)
    assert scheduler.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "velocity"}, r"prediction_type 'velocity'; .* \['epsilon', 'sample', 'v_prediction'\]"),
        (
            {"beta_schedule": "quadratic"},
            r"beta_schedule 'quadratic'; .* \['linear', 'scaled_linear', 'squared",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(config, message):
    with pytest.raises(ValueError, match=message):
        MCMScheduler(**config)


def test_trained_betas_that_are_too_few_are_refused_when_used():
    with pytest.raises(ValueError, match="starts at timestep 999, but `trained_betas` has only 2"):
        MCMScheduler(trained_betas=[0.1, 0.3]).set_timesteps(4)


def test_step_before_set_timesteps_is_refused():
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        MCMScheduler().step(latents(), 999, latents())


def test_steps_past_the_end_are_refused():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(1)
    scheduler.step(latents(), 999, latents())
    with pytest.raises(ValueError, match="All 1 steps .* call `set_timesteps` to start over"):
        scheduler.step(latents(), 999, latents())


def test_a_timestep_outside_the_schedule_is_refused():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    unknown = r"Timestep {} is not one of the schedule's: \[999, 499\]"
    with pytest.raises(ValueError, match=unknown.format(500)):
        scheduler.step(latents(), 500, latents())
    with pytest.raises(ValueError, match=unknown.format(500)):
        scheduler.previous_timestep(500)
    scheduler.step(latents(), 999, latents())
    with pytest.raises(ValueError, match=unknown.format(1000)):  # in later steps, too, where its index is known
        scheduler.step(latents(), 1000, latents())
    scheduler.set_timesteps(2)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match=unknown.format(998)):
        scheduler.step(latents(), 998, latents())


@pytest.mark.parametrize("timestep", [-1, 1000])
@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
def test_noise_of_a_timestep_that_was_not_trained_is_refused(name, timestep):
    timesteps = torch.tensor([999, timestep])
    with pytest.raises(ValueError, match=rf"must lie in 0..999, those of the training; got \[999, {timestep}\]"):
        getattr(MCMScheduler(), name)(latents(), latents(), timesteps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": torch.tensor([999, 999])}, r"one for the whole batch; got shape \(2,\)"),
        ({"model_output": torch.zeros(2, 4, 3, 8, 9)}, r"shape of `sample`, \(2, 4, 3, 8, 8\); got \(2, 4, 3, 8, 9\)"),
        ({"generator": [torch.Generator()] * 3}, "one for each of the 2 samples; got 3"),
    ],
)
def test_mismatched_arguments_of_step_are_refused(arguments, message):
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=message):
        scheduler.step(**{"model_output": latents(), "timestep": 999, "sample": latents(), **arguments})


def test_timesteps_off_the_distillation_grid_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(std_logging.getLogger("diffusers_mcm.scheduler"), "propagate", True)
    with caplog.at_level("WARNING", logger="diffusers_mcm.scheduler"):
        MCMScheduler().set_timesteps(timesteps=[999, 499])
        assert not caplog.records
        MCMScheduler().set_timesteps(timesteps=[999, 500, 3])
    assert "[500, 3] are not on the grid of distillation (999, …, 19)" in caplog.text


# --- configuration, saving, loading


def test_defaults_are_those_of_mcm_and_otherwise_of_lcm():
    ours = {name: p.default for name, p in inspect.signature(MCMScheduler.__init__).parameters.items()}
    theirs = {name: p.default for name, p in inspect.signature(LCMScheduler.__init__).parameters.items()}
    assert ours["timestep_scaling"] == 4.0 and ours["original_inference_steps"] == 50
    assert ours == {**theirs, "timestep_scaling": 4.0}


def test_public_interface_is_that_of_lcm():
    public = {name for name in dir(LCMScheduler()) if not name.startswith("_")}
    assert public - set(dir(MCMScheduler())) <= {"sigma_data"}


def test_saved_configuration_samples_alike_in_stock_lcm(tmp_path):
    ours = MCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "MCMScheduler" and saved["timestep_scaling"] == 4.0
    theirs = LCMScheduler.from_pretrained(tmp_path)
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    assert identical(sample_with(ours), sample_with(theirs))


def test_conversion_to_stock_lcm_keeps_timestep_scaling():
    assert LCMScheduler.from_config(MCMScheduler().config).config.timestep_scaling == 4.0
    assert MCMScheduler.from_config(LCMScheduler().config).config.timestep_scaling == 4.0
    assert MCMScheduler.from_config(LCMScheduler(timestep_scaling=10.0).config).config.timestep_scaling == 10.0


def test_noise_schedule_is_taken_over_from_another_scheduler():
    ddim = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    scheduler = MCMScheduler.from_config(ddim.config)
    assert torch.equal(scheduler.alphas_cumprod, ddim.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_scaling == 4.0


def test_module_path_is_a_disk_format():
    assert (MCMScheduler.__module__, MCMScheduler.__qualname__) == ("diffusers_mcm.scheduler", "MCMScheduler")
    assert scheduler_module.SchedulerMixin is SchedulerMixin


def test_diffusers_does_not_know_the_class_by_name():
    """Were there a class of this name in diffusers, saved pipelines would load that one instead."""
    assert not hasattr(diffusers, "MCMScheduler")
