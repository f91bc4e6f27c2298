"""The checks diffusers makes of every scheduler of its own, with the timesteps its LCM tests put in place of those
that are not in the grid.
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from diffusers_mcm.scheduler import MCMScheduler, MCMSchedulerOutput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.0120,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
LAST_OF_TEN = 99


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(seed=0):
    return torch.rand((4, 3, 8, 8), generator=seeded(seed))


def check_saved_scheduler_steps_alike(tmp_path, timestep=LAST_OF_TEN, steps=10, **config):
    scheduler = MCMScheduler(**{**CONFIG, **config})
    scheduler.save_config(tmp_path)
    loaded = MCMScheduler.from_pretrained(tmp_path)
    results = []
    for each in (scheduler, loaded):
        each.set_timesteps(steps)
        assert torch.equal(each.scale_model_input(images(), 0), images())
        results.append(each.step(0.1 * images(), timestep, images(), generator=seeded()).prev_sample)
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


def test_from_save_pretrained(tmp_path):
    check_saved_scheduler_steps_alike(tmp_path)


@pytest.mark.parametrize("timesteps", [100, 500, 1000])
def test_timesteps(tmp_path, timesteps):
    check_saved_scheduler_steps_alike(tmp_path, timestep=timesteps - 1, num_train_timesteps=timesteps)


@pytest.mark.parametrize(("start", "end"), [(0.0001, 0.002), (0.001, 0.02), (0.01, 0.2), (0.1, 2)])
def test_betas(tmp_path, start, end):
    check_saved_scheduler_steps_alike(tmp_path, beta_start=start, beta_end=end)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules(tmp_path, schedule):
    check_saved_scheduler_steps_alike(tmp_path, beta_schedule=schedule)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type(tmp_path, prediction_type):
    check_saved_scheduler_steps_alike(tmp_path, prediction_type=prediction_type)


@pytest.mark.parametrize("clip_sample", [True, False])
def test_clip_sample(tmp_path, clip_sample):
    check_saved_scheduler_steps_alike(tmp_path, clip_sample=clip_sample)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_thresholding(tmp_path, threshold, prediction_type):
    check_saved_scheduler_steps_alike(
        tmp_path, thresholding=True, sample_max_value=threshold, prediction_type=prediction_type
    )


@pytest.mark.parametrize(("timestep", "steps"), [(99, 10), (39, 25), (19, 50)])
def test_inference_steps(tmp_path, timestep, steps):
    check_saved_scheduler_steps_alike(tmp_path, timestep=timestep, steps=steps)


def test_time_indices(tmp_path):
    scheduler = MCMScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        check_saved_scheduler_steps_alike(tmp_path, timestep=t)


def test_from_pretrained_restores_the_configuration(tmp_path):
    scheduler = MCMScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    expected = dict(scheduler.config)
    del expected["_use_default_values"]
    assert MCMScheduler.from_pretrained(tmp_path).config == expected


def test_compatibles():
    scheduler = MCMScheduler(**CONFIG)
    assert scheduler.compatibles == [LCMScheduler]
    for compatible in scheduler.compatibles:
        other = compatible.from_config(scheduler.config)
        back = MCMScheduler.from_config(other.config)
        assert {key: value for key, value in back.config.items() if key in scheduler.config} == dict(scheduler.config)
        added = set(back.config) - set(scheduler.config)
        assert not added & set(inspect.signature(MCMScheduler.__init__).parameters)


def test_step_shape():
    scheduler = MCMScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[-2:]:
        assert scheduler.step(0.1 * images(), t, images()).prev_sample.shape == images().shape


def test_outputs_equivalence():
    scheduler = MCMScheduler(**CONFIG)
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(0.1 * images(), 999, images(), generator=seeded(), return_dict=return_dict))
    as_output, as_tuple = results
    assert isinstance(as_output, MCMSchedulerOutput) and isinstance(as_tuple, tuple)
    assert list(as_output.keys()) == ["prev_sample", "denoised"]
    assert all(torch.equal(a, b) for a, b in zip(as_output.values(), as_tuple, strict=True))


def test_public_api():
    scheduler = MCMScheduler(**CONFIG)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert len(scheduler) == 1000
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    assert "generator" in inspect.signature(scheduler.step).parameters


def test_add_noise_device():
    scheduler = MCMScheduler(**CONFIG)
    scheduler.set_timesteps(10, device=DEVICE)
    clean = images().to(DEVICE)
    noised = scheduler.add_noise(
        scheduler.scale_model_input(clean, 0.0), torch.randn_like(clean), scheduler.timesteps[:1]
    )
    assert noised.shape == clean.shape and noised.device == clean.device
    # Timesteps left on the CPU will do as well.
    noised_again = scheduler.add_noise(clean, torch.zeros_like(clean), scheduler.timesteps[:1].cpu())
    assert noised_again.device == clean.device
    stepped = scheduler.step(clean, scheduler.timesteps[0], clean, generator=seeded())
    assert stepped.prev_sample.device == clean.device


def test_deprecated_kwargs():
    assert "kwargs" not in inspect.signature(MCMScheduler.__init__).parameters
    assert MCMScheduler._deprecated_kwargs == []


def test_trained_betas(tmp_path):
    scheduler = MCMScheduler(**CONFIG, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    loaded = MCMScheduler.from_pretrained(tmp_path)
    assert loaded.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])


def test_getattr_is_correct():
    scheduler = MCMScheduler(**CONFIG)
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    assert scheduler.dummy_attribute == 5
    assert scheduler.save_pretrained == getattr(scheduler, "save_pretrained")  # noqa: B009
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="'MCMScheduler' object has no attribute 'does_not_exist'"):
        scheduler.does_not_exist  # noqa: B018


@pytest.mark.parametrize(("steps", "total", "mean"), [(1, 18.7097, 0.0244), (10, None, None)])
def test_full_loop(steps, total, mean):
    """diffusers' own reference sum for one step; for ten, its scheduler with our scaling."""
    number = 4 * 3 * 8 * 8
    start = (torch.arange(number).reshape(3, 8, 8, 4) / number).permute(3, 0, 1, 2)
    results = []
    for scheduler in (MCMScheduler(**CONFIG), LCMScheduler(**CONFIG, timestep_scaling=4.0)):
        sample, generator = start, seeded()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            sample = scheduler.step(sample * t / (t + 1), t, sample, generator).prev_sample
        results.append(sample)
    assert torch.equal(*results)
    if total is not None:
        assert results[0].abs().sum().item() == pytest.approx(total, abs=1e-2)
        assert results[0].abs().mean().item() == pytest.approx(mean, abs=1e-3)
