"""The phases of two experts on the flow path, and sampling with both, against closed forms."""

import logging

import pytest
import torch

from diffusers_mcm.consistency import FlowPath
from diffusers_mcm.scheduler import MCMFlowScheduler

SHAPE = (4, 2, 3, 5, 5)
BOUNDARY = 0.875
DEVIATION = 0.7  # of the data, normally distributed around 0: the flow of those is known


def latents(seed=0, dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deviation(sigma):
    return ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5


class Expert:
    """A perfect student of the phase that ends at σ = `end`: its velocity leads along the flow's curve to its end."""

    def __init__(self, end):
        self.end, self.times = end, []

    def __call__(self, x, t):
        self.times.append(float(t))
        sigma = float(t) / 1000
        return x * (deviation(self.end) / deviation(sigma) - 1) / (self.end - sigma)


def sample(scheduler, x, experts, seed=9):
    """As `WanPipeline` does it: the first expert is asked at the boundary and above."""
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        expert = experts[0] if t >= BOUNDARY * scheduler.config.num_train_timesteps else experts[1]
        x = scheduler.step(expert(x, t), t, x, generator=generator, return_dict=False)[0]
    return x


def experts():
    return Expert(BOUNDARY), Expert(0.0)


# --- the path --------------------------------------------------------------------------------------------------------
def test_the_default_path_is_one_phase():
    path = FlowPath()
    assert path.starts_in_noise and path.ends_clean and path.start_timestep == path.terminal_timestep == 1000
    x, noise = latents(), latents(1)
    assert path.at_start(x, noise) is noise and path.at_end(x, noise) is x
    t = torch.full((4,), 250.0)
    assert torch.equal(path.noise_again(x, noise, t), path.add_noise(x, noise, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_each_consistency_function_is_the_identity_where_its_phase_ends(dtype, boundary):
    x, v = latents(dtype=dtype), 100 * latents(1, dtype)
    for path, end in zip(FlowPath().split(boundary), (1000 * boundary, 0.0)):
        assert torch.equal(path.consistency_function(v, x, torch.full((4,), end)), x)
        assert not torch.equal(path.consistency_function(v, x, torch.full((4,), end + 50)), x)


def test_each_consistency_function_leads_along_the_line_to_the_end():
    clean, noise = latents(), latents(1)
    high, low = FlowPath().split(BOUNDARY)
    for path, end, t in ((high, BOUNDARY, [1000.0, 972.2, 900.0, 875.0]), (low, 0.0, [875.0, 833.3, 625.0, 1.0])):
        t = torch.tensor(t, dtype=torch.float64)
        x_t = path.add_noise(clean, noise, t)
        torch.testing.assert_close(path.consistency_function(noise - clean, x_t, t), (1 - end) * clean + end * noise)
        torch.testing.assert_close(path.predict_x0(noise - clean, x_t, t), clean)
        torch.testing.assert_close(path.at_end(clean, noise), (1 - end) * clean + end * noise)
    torch.testing.assert_close(low.at_start(clean, noise), 0.125 * clean + 0.875 * noise)
    assert high.at_start(clean, noise) is noise and low.at_end(clean, noise) is clean
    assert high.starts_in_noise and not high.ends_clean and low.ends_clean and not low.starts_in_noise


def test_noise_that_is_added_again_makes_of_the_end_what_noise_makes_of_the_data():
    """(1 − σ) x_0 and noise of deviation σ: the two noises are independent, so their squares add."""
    high = FlowPath().split(BOUNDARY)[0]
    t = high.solver_timesteps(48).double()[[1, 5, 12, 19]]
    clean, ones, zeros = latents(), torch.ones(SHAPE).double(), torch.zeros(SHAPE).double()
    sigma = (t / 1000).view(4, 1, 1, 1, 1).expand(SHAPE)
    torch.testing.assert_close(high.noise_again(high.at_end(clean, zeros), zeros, t), (1 - sigma) * clean)
    first = high.noise_again(high.at_end(zeros, ones), zeros, t)
    second = high.noise_again(zeros, ones, t)
    torch.testing.assert_close(first**2 + second**2, sigma**2, rtol=1e-6, atol=0)
    x = latents(2)
    assert torch.equal(high.noise_again(x, ones, torch.full((4,), 1000.0)), ones)
    torch.testing.assert_close(high.noise_again(x, ones, torch.full((4,), 875.0)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("boundary", [0.875, 0.9])
@pytest.mark.parametrize("steps", [20, 48, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_the_grids_of_both_phases_are_that_of_the_path_and_the_boundary(shift, steps, boundary):
    whole, (high, low) = FlowPath(shift), FlowPath(shift).split(boundary)
    at = torch.tensor(1000 * boundary, dtype=torch.float32)
    grids = [path.solver_timesteps(steps) for path in (low, high)]
    assert grids[0][-1] == at == low.start_timestep and grids[1][-1] == 1000 == high.start_timestep
    both, expected = torch.cat(grids), whole.solver_timesteps(steps)
    others = both[(both - at).abs() > 0.01]
    assert torch.equal(others, expected[(expected - at).abs() > 0.01]) and len(both) == len(others) + 1
    for path, grid, end in zip((low, high), grids, (torch.zeros(()), at)):
        assert torch.equal(path.previous_timestep(grid, steps), torch.cat([end[None], grid[:-1]]))
        assert path.previous_timestep(end[None], steps) == end


@pytest.mark.parametrize(
    ("shift", "steps", "first", "second"),
    [
        (5.0, 1, [1000], []),
        (5.0, 2, [1000], [875]),
        (5.0, 4, [1000, 937.5], [875, 625]),
        (5.0, 8, [1000, 972.22, 937.5, 892.86], [875, 750, 625, 416.67]),
        (5.0, 12, [1000, 982.14, 961.54, 937.5, 909.09], [875, 833.33, 781.25, 714.29, 625, 500, 312.5]),
        (8.0, 4, [1000, 960, 888.89], [875]),
        (8.0, 2, [1000], [875]),
        (1.0, 4, [1000], [875, 500, 250]),
    ],
)
def test_what_sampling_visits(shift, steps, first, second):
    """Of the steps no longer above the boundary the first is at it, whether or not the grid has a point there."""
    for path, expected in zip(FlowPath(shift).split(BOUNDARY), (first, second)):
        visited = path.visited_timesteps(steps, 48)
        torch.testing.assert_close(visited, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.005)
        assert set(visited.tolist()) <= set(path.solver_timesteps(48).tolist())


@pytest.mark.parametrize("ends", [dict(start=0.5, end=0.5), dict(end=-0.1), dict(start=1.1), dict(end=float("nan"))])
def test_a_phase_that_makes_no_sense_is_refused(ends):
    with pytest.raises(ValueError, match="A phase leads from a σ of at most 1 to a smaller one, at least 0; got"):
        FlowPath(**ends)


@pytest.mark.parametrize("boundary", [0.0, 1.0, 875, -1])
def test_a_boundary_that_makes_no_sense_is_refused(boundary):
    for make in (FlowPath().split, lambda boundary: MCMFlowScheduler(boundary=boundary)):
        with pytest.raises(ValueError, match=f"boundary between two experts is a σ between 0 and 1; got {boundary}"):
            make(boundary)


# --- the scheduler ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0, 17.0])
def test_two_steps_of_perfect_experts_are_the_flow_itself(shift):
    scheduler = MCMFlowScheduler(shift=shift, boundary=BOUNDARY)
    scheduler.set_timesteps(2)
    x = sample(scheduler, latents(), experts())
    torch.testing.assert_close(x, latents() * DEVIATION, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 4, 8, 12, 48])
@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_where_the_flow_is_straight_all_steps_lead_to_the_clean_sample(shift, steps, stochastic):
    scheduler, clean = MCMFlowScheduler(shift=shift, stochastic=stochastic, boundary=BOUNDARY), latents(5)
    scheduler.set_timesteps(steps)
    times = [[], []]

    def expert(number):
        def velocity(x, t):
            times[number].append(float(t))
            return (x - clean) / float(t) * 1000

        return velocity

    x = sample(scheduler, latents(), (expert(0), expert(1)))
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)
    assert sum(map(len, times)) == steps and times[1][0] == pytest.approx(875, abs=1e-3)
    assert min(times[0]) > 875 > max(times[1])


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_with_noise_two_perfect_experts_make_the_distribution_of_the_data(steps):
    scheduler, shape = MCMFlowScheduler(boundary=BOUNDARY), (2, 1, 1, 300, 300)
    scheduler.set_timesteps(steps)
    x = sample(scheduler, latents(shape=shape), experts())
    assert float(x.std()) == pytest.approx(DEVIATION, rel=0.01) and abs(float(x.mean())) < 0.01


def test_a_step_by_its_formula():
    scheduler, x, v = MCMFlowScheduler(boundary=BOUNDARY), latents(), latents(1)
    scheduler.set_timesteps(4)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    first, second, third, fourth = scheduler.timesteps
    output = scheduler.step(v, first, x, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(output.denoised, x - v)  # the clean sample, as everywhere
    keep = 0.0625 / 0.125
    again = keep * (x - 0.125 * v) + (0.9375**2 - (keep * 0.875) ** 2) ** 0.5 * noise
    torch.testing.assert_close(output.prev_sample, again)
    state = torch.random.get_rng_state()
    output = scheduler.step(v, second, x)  # to where the second expert starts: nothing is added
    torch.testing.assert_close(output.prev_sample, x - 0.0625 * v, rtol=0, atol=1e-12)
    assert torch.equal(torch.random.get_rng_state(), state)
    output = scheduler.step(v, third, x, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(output.prev_sample, 0.375 * (x - 0.875 * v) + 0.625 * noise)
    output = scheduler.step(v, fourth, x)
    torch.testing.assert_close(output.prev_sample, x - 0.625 * v)


def test_what_lies_at_the_boundary_is_the_second_experts():
    scheduler = MCMFlowScheduler(boundary=BOUNDARY)
    for given in (
        dict(num_inference_steps=4),
        dict(timesteps=[1000, 937.5, 875, 625]),
        dict(sigmas=[1, 0.875, 0.625]),
    ):
        scheduler.set_timesteps(**given)
        found = list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()))
        assert [pair for pair in found if 874 < pair[0] < 876] == [(pytest.approx(875, abs=1e-3), BOUNDARY)]
        assert max(t for t, _ in found if t < 900) < 875
    again = MCMFlowScheduler(boundary=BOUNDARY)
    again.set_timesteps(timesteps=scheduler.timesteps)  # its own are taken back as they are
    assert torch.equal(again.timesteps, scheduler.timesteps) and torch.equal(again.sigmas, scheduler.sigmas)


@pytest.mark.parametrize(("timesteps", "later"), [([800.0, 400.0], 2), ([1000.0, 900.0], 0)])
def test_steps_on_one_side_of_the_boundary(timesteps, later):
    """Above it the last step leads to the clean sample all the same, below it everything is as with one expert."""
    scheduler, x, v = MCMFlowScheduler(boundary=BOUNDARY), latents(), latents(1)
    scheduler.set_timesteps(timesteps=timesteps)
    generator = torch.Generator().manual_seed(3)
    found = scheduler.step(v, scheduler.timesteps[0], x, generator=generator).prev_sample
    one = MCMFlowScheduler()
    one.set_timesteps(timesteps=timesteps)
    plain = one.step(v, one.timesteps[0], x, generator=torch.Generator().manual_seed(3)).prev_sample
    assert torch.equal(found, plain) == (later == 2)
    last = scheduler.step(v, scheduler.timesteps[1], x, generator=generator)
    torch.testing.assert_close(last.prev_sample, x - timesteps[1] / 1000 * v)


def test_a_step_over_the_boundary_goes_on_and_is_told(caplog):
    scheduler, x, v = MCMFlowScheduler(boundary=BOUNDARY), latents(), latents(1)
    with caplog.at_level(logging.WARNING):
        scheduler.set_timesteps(timesteps=[1000, 937.5, 833.3333])
    assert "A step goes past 875, where the second expert starts, and beyond what the first one learnt" in caplog.text
    scheduler.step(v, scheduler.timesteps[0], x)
    output = scheduler.step(v, scheduler.timesteps[1], x)
    torch.testing.assert_close(output.prev_sample, x + (0.8333333 - 0.9375) * v, rtol=0, atol=1e-6)


def test_one_step_leaves_the_second_expert_out_and_is_told(caplog):
    scheduler, x, v = MCMFlowScheduler(boundary=BOUNDARY), latents(), latents(1)
    with caplog.at_level(logging.WARNING):
        scheduler.set_timesteps(1)
    assert "No step of 1 lies below the boundary 0.875: the second expert, which finishes what" in caplog.text
    assert torch.equal(scheduler.step(v, 1000.0, x).prev_sample, x - v)


def test_points_at_a_boundary_that_the_grid_misses_are_known(caplog):
    with caplog.at_level(logging.WARNING):
        scheduler = MCMFlowScheduler(shift=8.0, boundary=BOUNDARY)
        scheduler.set_timesteps(4)
        scheduler.set_timesteps(timesteps=[1000, 960, 875])
    assert caplog.text == ""


def test_the_boundary_is_saved(tmp_path):
    MCMFlowScheduler(boundary=0.9).save_pretrained(tmp_path)
    again = MCMFlowScheduler.from_pretrained(tmp_path)
    assert again.config.boundary == 0.9 and [phase.end for phase in again.phases] == [0.9, 0.0]
    assert len(MCMFlowScheduler.from_config(again.config, boundary=None).phases) == 1
