"""The path of flow-matching models against closed forms and Euler's method."""

import pytest
import torch

from diffusers_mcm.consistency import FlowPath
from diffusers_mcm.distillation.teacher import teacher_step

SHAPE = (4, 2, 3, 5, 5)


def latents(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("steps", [20, 40, 48, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 17.0])
def test_the_grid_is_shifted_and_a_step_back_lands_on_it(shift, steps):
    path, u = FlowPath(shift), torch.arange(1, steps + 1, dtype=torch.float64) / steps
    grid = path.solver_timesteps(steps)
    expected = (1000 * shift * u / (1 + (shift - 1) * u)).float()
    assert torch.equal(grid, expected) and grid[-1] == path.terminal_timestep == 1000
    for given in (grid, grid.double(), grid + 1e-4):
        assert torch.equal(path.previous_timestep(given, steps), torch.cat([torch.zeros(1), grid[:-1]]))


@pytest.mark.parametrize("steps", [20, 40, 48])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 17.0])
def test_steps_one_after_the_other_end_at_zero(shift, steps):
    path, t, visited = FlowPath(shift), torch.tensor([1000.0]), []
    for _ in range(steps):
        visited.append(t)
        t = path.previous_timestep(t, steps)
    assert t == 0 and path.previous_timestep(t, steps) == 0
    assert torch.equal(torch.cat(visited).flip(0), path.solver_timesteps(steps))


def test_the_default_grid_holds_what_few_steps_visit():
    grid = FlowPath().solver_timesteps().flip(0)
    assert len(grid) == 48
    four, eight = (grid[torch.arange(steps) * 48 // steps] for steps in (4, 8))
    torch.testing.assert_close(four, torch.tensor([1000.0, 937.5, 833.33, 625.0]), rtol=0, atol=0.01)
    assert float(eight[-1]) == pytest.approx(416.67, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_consistency_function_is_the_identity_where_there_is_no_noise(dtype):
    x, output = latents(dtype=dtype), 100 * latents(1, dtype)
    assert torch.equal(FlowPath().consistency_function(output, x, torch.zeros(4)), x)
    assert not torch.equal(FlowPath().consistency_function(output, x, torch.full((4,), 96.0)), x)


def test_the_velocity_says_where_the_ends_are():
    path, clean, noise = FlowPath(), latents(dtype=torch.float64), latents(1, torch.float64)
    t = torch.tensor([0.0, 250.0, 937.5, 1000.0], dtype=torch.float64)
    x_t = path.add_noise(clean, noise, t)
    assert torch.equal(x_t[0], clean[0]) and torch.equal(x_t[3], noise[3])
    torch.testing.assert_close(path.predict_x0(noise - clean, x_t, t), clean)
    torch.testing.assert_close(path.predict_noise(noise - clean, x_t, t), noise)


def test_a_guided_step_is_eulers_with_the_guided_velocity():
    """x̂_0 and ε̂ are guided each by itself; on this path that is one velocity."""
    path, x_t, w = FlowPath(5.0), latents(), torch.tensor([0.0, 2.0, 4.5, 6.0])
    t = path.solver_timesteps(48)[[0, 20, 40, 47]]
    t_prev = path.previous_timestep(t, 48)

    def velocity(x, text):
        return torch.tanh(x + text)

    def denoise(x, t, text):
        return velocity(x, text["prompt_embeds"])

    text, negative = ({"prompt_embeds": torch.full((4, 1, 1, 1, 1), value)} for value in (0.3, -0.2))
    stepped = teacher_step(denoise, path, x_t, t, t_prev, text, negative, w)
    given, without = (velocity(x_t, each["prompt_embeds"]) for each in (text, negative))
    w, dt = w.view(4, 1, 1, 1, 1), ((t_prev - t) / 1000).view(4, 1, 1, 1, 1)
    torch.testing.assert_close(stepped, x_t + dt * (given + w * (given - without)), rtol=0, atol=1e-6)


def test_the_path_of_a_normal_distribution():
    """Of x_0 ~ N(0, s²) the flow is known: x_t is as many deviations from 0 all along its way, and so is where the
    solver's steps lead to, more exactly the more there are."""
    path, s, x = FlowPath(5.0), 0.7, latents(dtype=torch.float64)

    def deviation(t):
        alpha, sigma = path.coefficients(t.double())
        return (alpha**2 * s**2 + sigma**2).sqrt()

    def velocity(x_t, t):  # E[ε − x_0 | x_t]
        alpha, sigma = (each[:, None, None, None, None] for each in path.coefficients(t.double()))
        return x_t * (sigma - alpha * s**2) / (alpha**2 * s**2 + sigma**2)

    errors = []
    for steps in (50, 100):
        x_t, t = x, torch.full((len(x),), 1000.0)
        for _ in range(steps // 2):
            before, output = t, velocity(x_t, t)
            t = path.previous_timestep(t, steps)
            x_t = path.step(path.predict_x0(output, x_t, before), path.predict_noise(output, x_t, before), t)
        exact = x * (deviation(t) / deviation(torch.full_like(t, 1000.0)))[:, None, None, None, None]
        errors.append(float((x_t - exact).norm() / exact.norm()))
    assert errors[0] < 0.02 and errors[1] == pytest.approx(errors[0] / 2, rel=0.2)


def test_what_makes_no_sense_is_refused():
    for shift in (0.0, -5.0, float("nan")):
        with pytest.raises(ValueError, match=rf"shift must be a positive number .*; got {shift}"):
            FlowPath(shift)
    with pytest.raises(ValueError, match="num_solver_steps must be 1 or more; got 0"):
        FlowPath().solver_timesteps(0)
    for t in (-1.0, 1000.5):
        with pytest.raises(ValueError, match=rf"Timesteps must lie in 0..1000; got \[{t}\]"):
            FlowPath().coefficients(torch.tensor([t]))
