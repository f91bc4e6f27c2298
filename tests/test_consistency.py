"""The noise path and eq. 1 against closed forms, inverses and diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from diffusers_mcm.consistency import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    FlowPath,
    NoisePath,
    VariancePreservingPath,
    boundary_scalings,
)
from diffusers_mcm.distillation.teacher import teacher_step
from diffusers_mcm.distillation.trajectory import noisy_start, one_step_sample

SHAPE = (4, 2, 3, 5, 5)
TIMESTEPS = torch.tensor([0, 19, 500, 999])
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def latents(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_path(**settings):
    return VariancePreservingPath.from_scheduler_config(CONFIG, **settings)


def network_output(path, x0, noise, t):
    """What a perfect network would say."""
    alpha, sigma = (value.reshape(-1, 1, 1, 1, 1) for value in path.coefficients(t))
    return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[path.prediction_type]


@pytest.fixture(params=sorted(PREDICTION_TYPES))
def path(request):
    return make_path(prediction_type=request.param)


# --- eq. 1


def test_boundary_holds_at_zero():
    assert boundary_scalings(0) == (1.0, 0.0)


@pytest.mark.parametrize("t", [1e-6, 0.1, 1, 19, 999])
def test_boundary_scalings_are_those_of_the_paper(t):
    c_skip, c_out = boundary_scalings(t)
    s = 4 * t
    assert c_skip == pytest.approx(0.25 / (s**2 + 0.25))
    assert c_out == pytest.approx(s / (s**2 + 0.25) ** 0.5)
    assert c_skip + c_out**2 == pytest.approx(1)


def test_boundary_scalings_take_tensors_and_other_constants():
    c_skip, c_out = boundary_scalings(torch.tensor([0.0, 1.0]), timestep_scaling=3.0, sigma_data=2.0)
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 4 / 13]))
    torch.testing.assert_close(c_out, torch.tensor([0.0, 3 / 13**0.5]))


def test_consistency_function_tends_to_the_identity_as_t_tends_to_zero(path):
    """At t = 0 it is the identity whatever the network says; nearer the data, the network counts for less."""
    output, x_t = latents(1), latents()
    at_zero = path.consistency_function(output, x_t, torch.zeros(4, dtype=torch.long))
    assert torch.equal(at_zero, x_t)
    small = [VariancePreservingPath(path.alphas**2, path.prediction_type, scale) for scale in (1, 1e-2, 1e-4)]
    t = torch.ones(4, dtype=torch.long)
    distances = [(each.consistency_function(output, x_t, t) - x_t).abs().max() for each in small]
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-3


def test_consistency_function_is_the_clean_sample_far_from_zero(path):
    clean, noise = latents(1), latents(2)
    t = torch.tensor([259, 499, 759, 999])
    x_t = path.add_noise(clean, noise, t)
    result = path.consistency_function(network_output(path, clean, noise, t), x_t, t)
    torch.testing.assert_close(result, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("timestep_scaling", [4.0, 10.0])
def test_consistency_function_is_what_stock_lcm_calls_denoised(path, timestep_scaling):
    """Training and sampling share one f."""
    path = make_path(prediction_type=path.prediction_type, timestep_scaling=timestep_scaling)
    scheduler = LCMScheduler(**CONFIG, prediction_type=path.prediction_type, timestep_scaling=timestep_scaling)
    for t in (19, 259, 999):
        scheduler.set_timesteps(50)
        expected = scheduler.step(latents(1), t, latents()).denoised
        result = path.consistency_function(latents(1), latents(), torch.full((4,), t))
        torch.testing.assert_close(result, expected)


def test_consistency_function_passes_gradients(path):
    output = latents(1).requires_grad_()
    path.consistency_function(output, latents(), torch.full((4,), 499)).sum().backward()
    assert output.grad.abs().min() > 0


# --- the path


def test_coefficients_are_variance_preserving_and_fall():
    path = make_path()
    alpha, sigma = path.coefficients(torch.arange(1000))
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


@pytest.mark.parametrize("beta_schedule", sorted(BETA_SCHEDULES))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedules_equal_those_of_diffusers(beta_schedule, zero_snr):
    config = {**CONFIG, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    theirs = DDIMScheduler(**config, prediction_type="v_prediction")
    path = VariancePreservingPath.from_scheduler_config(theirs.config)
    assert torch.equal(path.alphas, theirs.alphas_cumprod.sqrt())
    assert torch.equal(path.sigmas, (1 - theirs.alphas_cumprod).sqrt())
    assert path.prediction_type == "v_prediction"
    assert (path.alphas[-1] == 0) == zero_snr


def test_trained_betas_need_nothing_else():
    betas = torch.linspace(0.01, 0.02, 10).tolist()
    path = VariancePreservingPath.from_scheduler_config({"trained_betas": betas, "num_train_timesteps": 10})
    torch.testing.assert_close(path.alphas**2, torch.cumprod(1 - torch.tensor(betas), 0))
    assert path.terminal_timestep == 9


def test_overrides_win_and_the_boundary_is_not_the_base_models():
    config = LCMScheduler(**CONFIG, timestep_scaling=10.0).config
    path = VariancePreservingPath.from_scheduler_config(config)
    assert path.timestep_scaling == 4.0
    path = VariancePreservingPath.from_scheduler_config(config, timestep_scaling=2.0, prediction_type="sample")
    assert (path.timestep_scaling, path.prediction_type) == (2.0, "sample")


def test_add_noise_equals_that_of_diffusers():
    theirs = DDPMScheduler(**CONFIG)
    expected = theirs.add_noise(latents(1), latents(2), TIMESTEPS)
    assert torch.equal(make_path().add_noise(latents(1), latents(2), TIMESTEPS), expected)


def test_predictions_undo_add_noise(path):
    clean, noise = latents(1), latents(2)
    x_t = path.add_noise(clean, noise, TIMESTEPS)
    output = network_output(path, clean, noise, TIMESTEPS)
    torch.testing.assert_close(path.predict_x0(output, x_t, TIMESTEPS), clean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(path.predict_noise(output, x_t, TIMESTEPS), noise, rtol=1e-3, atol=1e-4)


def test_predictions_put_together_are_the_noisy_sample(path):
    """Whatever the network says, α x̂_0 + σ ε̂ = x_t: a step to the same timestep stays."""
    x0, noise = path.predict_x0(latents(1), latents(), TIMESTEPS), path.predict_noise(latents(1), latents(), TIMESTEPS)
    torch.testing.assert_close(path.step(x0, noise, TIMESTEPS), latents(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_latents_type_and_float32_precision(path, dtype):
    x, output, t = latents(0, dtype), latents(1, dtype), torch.tensor([19, 259, 500, 979])
    wide = (latents(0, dtype).float(), latents(1, dtype).float())
    for method in (path.predict_x0, path.predict_noise, path.consistency_function, path.add_noise, path.step):
        arguments = (x, output, t) if method in (path.add_noise, path.step) else (output, x, t)
        exact = method(*(wide if method in (path.add_noise, path.step) else wide[::-1]), t)
        result = method(*arguments)
        assert result.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(result.float(), exact, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(result, exact.to(dtype))


# --- the solver's grid


def test_solver_grid_is_that_of_the_paper():
    grid = make_path().solver_timesteps()
    assert grid.dtype == torch.int64
    assert grid.tolist() == list(range(19, 1000, 20))
    assert make_path().solver_timesteps(4).tolist() == [249, 499, 749, 999]


def test_solver_grid_is_the_schedulers():
    scheduler = LCMScheduler()
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps.flip(0), make_path().solver_timesteps(50))


def test_previous_timestep_is_one_interval_nearer_and_not_below_zero():
    path = make_path()
    assert path.previous_timestep(torch.tensor([19, 39, 999])).tolist() == [0, 19, 979]
    assert path.previous_timestep(torch.tensor([5, 249, 999]), 4).tolist() == [0, 0, 749]


# --- another kind of path fits in


def test_a_flow_path_is_a_subclass_and_nothing_more():
    """Velocity prediction on a shifted grid, whose timesteps are no integers and which has no boundary scalings."""

    def denoise(x, t, text):
        return noise - clean  # the velocity, the same all along the way

    path, clean, noise = FlowPath(5.0), latents(1), latents(2)
    t = path.solver_timesteps(4)
    torch.testing.assert_close(t, torch.tensor([625.0, 2500 / 3, 937.5, 1000.0]))
    x_t = noisy_start(path, clean, noise, t)
    assert torch.equal(x_t[-1], noise[-1])
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.consistency_function(denoise(x_t, t, {}), x_t, t), clean, **close)
    t_prev = path.previous_timestep(t, 4)
    torch.testing.assert_close(t_prev, torch.tensor([0.0, 625.0, 2500 / 3, 937.5]))

    def guided(x, t, text):
        return torch.cat([denoise(x, t, text)] * 2)

    stepped = teacher_step(guided, path, x_t, t, t_prev, {}, {}, 3.0)
    torch.testing.assert_close(stepped, path.add_noise(clean, noise, t_prev), **close)
    torch.testing.assert_close(one_step_sample(denoise, path, noise, {}), clean, **close)
    with pytest.raises(TypeError, match="abstract"):
        NoisePath()


# --- errors


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({}, {}, r"it lacks \['beta_start', 'beta_end', 'beta_schedule'\]"),
        (CONFIG, {"beta_schedule": "cosine"}, r"beta_schedule 'cosine'; .* \['linear', 'scaled_linear', 'squared"),
        (CONFIG, {"prediction_type": "flow"}, r"prediction_type 'flow'; .* \['epsilon', 'sample', 'v_prediction'\]"),
        (CONFIG, {"time_scaling": 4.0}, r"Unknown overrides \['time_scaling'\]; valid ones are .*'timestep_scaling'"),
        (CONFIG, {"timestep_scaling": 0.0}, "must be positive; got 0.0 and 0.5"),
        (CONFIG, {"sigma_data": -1.0}, "must be positive; got 4.0 and -1.0"),
        (CONFIG, {"rescale_betas_zero_snr": True}, "cannot be used with prediction_type 'epsilon'"),
        ({"trained_betas": [0.1, 0.2]}, {}, "trained_betas has 2 values, but num_train_timesteps is 1000"),
    ],
)
def test_unusable_configurations_are_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        VariancePreservingPath.from_scheduler_config(config, **overrides)


def test_alphas_must_be_a_vector():
    with pytest.raises(ValueError, match="one value per timestep"):
        VariancePreservingPath(torch.ones(2, 2))


@pytest.mark.parametrize("steps", [0, -50, 30, 1001])
def test_a_grid_that_misses_the_terminal_timestep_is_refused(steps):
    with pytest.raises(ValueError, match=f"divisor of the 1000 training timesteps.* got {steps}"):
        make_path().solver_timesteps(steps)
    with pytest.raises(ValueError, match="divisor"):
        make_path().previous_timestep(TIMESTEPS, steps)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([19]), r"shape \(4,\), one for each sample of the latents; got \(1,\)"),
        (torch.tensor(19), r"got \(\)"),
        (torch.tensor([19.0] * 4), "must be integers; got torch.float32"),
        (torch.tensor([0, 1, 2, 1000]), r"in 0..999; got \[0, 1, 2, 1000\]"),
        (torch.tensor([-1, 1, 2, 3]), "in 0..999"),
    ],
)
def test_wrong_timesteps_are_refused(t, message):
    path = make_path()
    for method in (path.add_noise, path.predict_x0, path.predict_noise, path.consistency_function, path.step):
        with pytest.raises(ValueError, match=message):
            method(latents(), latents(1), t)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"latents' shape \(4, 2, 3, 5, 5\); got \(4, 4, 3, 5, 5\)"):
        make_path().predict_x0(torch.zeros(4, 4, 3, 5, 5), latents(), TIMESTEPS)
