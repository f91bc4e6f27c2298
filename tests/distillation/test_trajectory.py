"""Starts of trajectories and the frames drawn, against their definitions."""

import pytest
import torch

from diffusers_mcm.consistency import FlowPath, VariancePreservingPath
from diffusers_mcm.distillation.trajectory import (
    TIMESTEPS,
    VISITING_STEPS,
    mixed_start,
    neighbours,
    noisy_start,
    one_step_sample,
    pick_frames,
)
from diffusers_mcm.scheduler import MCMFlowScheduler, MCMScheduler

SHAPE = (4, 2, 3, 5, 5)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def latents(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def text():
    return {"states": torch.arange(4.0).reshape(4, 1, 1).expand(4, 5, 8)}


@pytest.fixture
def path():
    return VariancePreservingPath.from_scheduler_config(CONFIG, prediction_type="v_prediction")


class Network:
    """Its output depends on latents and text; it keeps what it was called with."""

    def __init__(self):
        self.calls = []
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def __call__(self, x, t, text):
        self.calls.append((x, t, text))
        return self.weight * x + text["states"].mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)


def test_start_is_pure_noise_at_the_terminal_timestep_and_nowhere_else(path):
    t = torch.tensor([19, 979, 999, 999])
    start = noisy_start(path, latents(1), latents(2), t)
    assert torch.equal(start[2:], latents(2)[2:])
    assert torch.equal(start[:2], path.add_noise(latents(1), latents(2), t)[:2])
    assert not torch.equal(path.add_noise(latents(1), latents(2), t)[2:], latents(2)[2:])


def test_start_keeps_the_type_of_the_latents(path):
    start = noisy_start(path, latents(1, torch.bfloat16), latents(2), torch.tensor([19, 979, 999, 999]))
    assert start.dtype == torch.bfloat16
    assert torch.equal(start[3], latents(2)[3].bfloat16())


def test_one_step_sample_is_the_consistency_function_at_the_end(path):
    network = Network()
    result = one_step_sample(network, path, latents(), text())
    ((x, t, words),) = network.calls
    assert torch.equal(x, latents()) and t.tolist() == [999] * 4 and words["states"].shape == (4, 5, 8)
    expected = path.consistency_function(Network()(latents(), t, text()), latents(), t)
    assert torch.equal(result, expected)
    assert not result.requires_grad


def test_real_videos_and_own_samples_as_the_coin_falls(path):
    network, uniforms = Network(), torch.tensor([0.49, 0.5, 0.0, 0.99])
    start = mixed_start(network, path, latents(1), latents(2), uniforms, 0.5, text())
    real = torch.tensor([True, False, True, False])
    own = one_step_sample(Network(), path, latents(2), text())
    assert torch.equal(start[real], latents(1)[real])
    torch.testing.assert_close(start[~real], own[~real])
    assert not start.requires_grad


def test_the_network_runs_on_own_samples_only(path):
    network, uniforms = Network(), torch.tensor([0.1, 0.9, 0.2, 0.8])
    mixed_start(network, path, latents(1), latents(2), uniforms, 0.5, text())
    ((x, _, words),) = network.calls
    assert torch.equal(x, latents(2)[[1, 3]])
    assert words["states"][:, 0, 0].tolist() == [1.0, 3.0]


def test_lambda_real_one_is_plain_distillation_and_zero_is_all_own(path):
    uniforms = torch.tensor([0.0, 0.3, 0.6, 1 - 2**-24])
    network = Network()
    start = mixed_start(network, path, latents(1), latents(2), uniforms, 1.0, text())
    assert torch.equal(start, latents(1)) and not network.calls
    start = mixed_start(network, path, latents(1), latents(2), uniforms, 0.0, text())
    torch.testing.assert_close(start, one_step_sample(Network(), path, latents(2), text()))


def test_the_coin_has_the_expectation_of_the_weighted_sum(path):
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    x0, noise = torch.ones(4000, 1, 1, 1, 1), torch.zeros(4000, 1, 1, 1, 1)
    words = {"states": torch.zeros(4000, 1, 1)}
    start = mixed_start(Network(), path, x0, noise, uniforms, 0.3, words)
    assert start.mean().item() == pytest.approx(0.3, abs=0.03)


def test_mixing_leaves_the_real_latents_unchanged(path):
    x0 = latents(1)
    mixed_start(Network(), path, x0, latents(2), torch.full((4,), 0.9), 0.5, text())
    assert torch.equal(x0, latents(1))


@pytest.mark.parametrize(("num_frames", "l"), [(16, 2), (16, 1), (16, 16), (7, 3), (5, 2)])
def test_one_frame_is_drawn_from_each_segment(num_frames, l):  # noqa: E741
    uniforms = torch.rand((500, l), generator=torch.Generator().manual_seed(0))
    frames = pick_frames(num_frames, uniforms)
    assert frames.shape == (500, l) and frames.dtype == torch.int64
    for i in range(l):
        segment = set(range(i * num_frames // l, (i + 1) * num_frames // l))
        assert set(frames[:, i].tolist()) == segment


def test_draws_are_spread_evenly_over_a_segment():
    uniforms = torch.tensor([[0.0, 0.0], [0.124, 0.126], [0.5, 0.999], [1 - 2**-24, 1 - 2**-24]])
    assert pick_frames(16, uniforms).tolist() == [[0, 8], [0, 9], [4, 15], [7, 15]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_real": 1.5}, "lambda_real must be between 0 and 1; got 1.5"),
        ({"lambda_real": -0.1}, "lambda_real must be between 0 and 1; got -0.1"),
        ({"uniforms": torch.zeros(3)}, r"one uniform draw per sample, \(4,\); got \(3,\)"),
    ],
)
def test_wrong_arguments_of_mixed_start_are_refused(path, changes, message):
    arguments = {
        "denoise": Network(),
        "path": path,
        "x0": latents(1),
        "start_noise": latents(2),
        "uniforms": torch.zeros(4),
        "lambda_real": 0.5,
        "text": text(),
    }
    with pytest.raises(ValueError, match=message):
        mixed_start(**{**arguments, **changes})


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 17)])
def test_more_frames_than_the_clip_has_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, l\) with l from 1 to the clip's 16 frames; got \(4,"):
        pick_frames(16, torch.zeros(shape))


@pytest.mark.parametrize("grid_steps", [50, 8, 4])
def test_visited_timesteps_are_the_grid_and_what_sampling_visits(path, grid_steps):
    grid = path.solver_timesteps(grid_steps)
    expected = grid.tolist()
    for steps in VISITING_STEPS:
        if steps <= grid_steps:
            scheduler = MCMScheduler(original_inference_steps=grid_steps)
            scheduler.set_timesteps(steps)
            expected += scheduler.timesteps.tolist()
    assert TIMESTEPS["visited"](path, grid_steps).tolist() == expected
    assert TIMESTEPS["uniform"](path, grid_steps).tolist() == grid.tolist()
    assert TIMESTEPS["visited"](path, grid_steps).dtype == torch.int64


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_each_expert_trains_what_sampling_visits_of_its_phase(shift):
    phases, sampled = FlowPath(shift).split(0.875), MCMFlowScheduler(shift=shift, boundary=0.875)
    visits = []
    for steps in VISITING_STEPS:
        sampled.set_timesteps(steps)
        visits += [round(t, 2) for t in sampled.timesteps.tolist()]
    found = []
    for path in phases:
        grid, both = path.solver_timesteps(48), TIMESTEPS["visited"](path, 48)
        assert torch.equal(both[: len(grid)], grid) and torch.equal(TIMESTEPS["uniform"](path, 48), grid)
        found += [round(t, 2) for t in both[len(grid) :].tolist()]
    assert sorted(found) == sorted(visits)


# --- the phases of two experts ---------------------------------------------------------------------------------------
PHASES = FlowPath().split(0.875)


def test_the_first_experts_own_sample_leads_from_noise_to_the_boundary():
    path, network = PHASES[0], Network()
    uniforms = torch.tensor([0.0, 0.9, 0.1, 0.8])
    start = mixed_start(network, path, latents(1), latents(2), uniforms, 0.5, text())
    ((x, t, _),) = network.calls
    assert torch.equal(x, latents(2)[[1, 3]]) and t.tolist() == [1000.0, 1000.0]
    output = Network()(latents(2), t, text())
    torch.testing.assert_close(start[[1, 3]], (latents(2) - 0.125 * output)[[1, 3]].detach())
    torch.testing.assert_close(start[[0, 2]], (0.125 * latents(1) + 0.875 * latents(2))[[0, 2]])  # the video there


def test_the_second_experts_own_sample_leads_from_the_video_at_the_boundary_to_a_clean_one():
    path, network = PHASES[1], Network()
    uniforms = torch.tensor([0.0, 0.9, 0.1, 0.8])
    start = mixed_start(network, path, latents(1), latents(2), uniforms, 0.5, text())
    ((x, t, _),) = network.calls
    there = 0.125 * latents(1) + 0.875 * latents(2)
    torch.testing.assert_close(x, there[[1, 3]])
    assert t.tolist() == [875.0, 875.0]
    output = Network()(there, torch.full((4,), 875.0), text())
    torch.testing.assert_close(start[[1, 3]], (there - 0.875 * output)[[1, 3]].detach())
    assert torch.equal(start[[0, 2]], latents(1)[[0, 2]])


def test_what_starts_in_the_second_phase_is_no_pure_noise():
    t = torch.tensor([875.0, 1000.0, 625.0, 416.5])
    start = noisy_start(PHASES[1], latents(1), latents(2), t)
    torch.testing.assert_close(start[0], 0.125 * latents(1)[0] + 0.875 * latents(2)[0])
    start = noisy_start(PHASES[0], latents(1), latents(2), torch.tensor([1000.0, 937.5, 900.0, 890.0]))
    assert torch.equal(start[0], latents(2)[0])
    keep = 0.0625 / 0.125
    torch.testing.assert_close(
        start[1], keep * latents(1)[1] + (0.9375**2 - (keep * 0.875) ** 2) ** 0.5 * latents(2)[1]
    )


def test_neighbours_lie_one_frame_on_but_for_the_last():
    frames = torch.tensor([[0, 3], [2, 1]])
    assert neighbours(frames, 4).tolist() == [[1, 2], [3, 2]]
    with pytest.raises(ValueError, match="a clip of 1 has no neighbour: expected 2 frames or more"):
        neighbours(torch.zeros(1, 1, dtype=torch.long), 1)
