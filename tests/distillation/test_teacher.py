"""The teacher's guidance against its formula, its step against diffusers' DDIM."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm.consistency import VariancePreservingPath
from diffusers_mcm.distillation.teacher import guided_prediction, teacher_step

SHAPE = (3, 4, 2, 6, 6)


def latents(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(level):
    return {"states": torch.full((3, 5, 8), float(level)), "mask": torch.ones(3, 5)}


def ddim(prediction_type="epsilon"):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(50)
    return scheduler


class Network:
    """Its output depends on latents, time and text; it keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, text):
        self.calls.append((x, t, text))
        level = text["states"].mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)
        return (0.5 * x + level + t.reshape(-1, 1, 1, 1, 1) / 1000).sin()


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def path(request):
    return VariancePreservingPath.from_scheduler_config(ddim(request.param).config)


def test_both_halves_go_through_the_network_in_one_call(path):
    network, t = Network(), torch.tensor([19, 499, 999])
    guided_prediction(network, path, latents(), t, text(1), text(0), 2.0)
    ((x, times, words),) = network.calls
    assert torch.equal(x, torch.cat([latents(), latents()]))
    assert torch.equal(times, torch.cat([t, t]))
    assert words["states"].shape == (6, 5, 8) and words["mask"].shape == (6, 5)


def test_guidance_is_cond_plus_w_times_the_difference(path):
    network, t, x_t = Network(), torch.tensor([19, 499, 999]), latents()
    w = torch.tensor([0.0, 5.0, 15.0])
    estimates = []
    for words in (text(1), text(0)):
        output = network(x_t, t, words)
        estimates.append((path.predict_x0(output, x_t, t), path.predict_noise(output, x_t, t)))
    results = guided_prediction(network, path, x_t, t, text(1), text(0), w)
    for result, conditional, unconditional in zip(results, *estimates, strict=True):
        expected = conditional + w.reshape(-1, 1, 1, 1, 1) * (conditional - unconditional)
        torch.testing.assert_close(result, expected)


def test_without_guidance_the_negative_text_has_no_effect(path):
    t = torch.tensor([19, 499, 999])
    results = [guided_prediction(Network(), path, latents(), t, text(1), text(other), 0.0) for other in (0, 7)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_same_text_on_both_sides_makes_guidance_the_identity(path):
    t = torch.tensor([19, 499, 999])
    results = [guided_prediction(Network(), path, latents(), t, text(1), text(1), w) for w in (0.0, 12.0)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("t", [19, 39, 499, 979, 999])
@pytest.mark.parametrize("w", [0.0, 7.5])
def test_step_equals_that_of_diffusers_ddim(path, t, w):
    """Guiding x̂_0 and ε̂ is guiding the output: all three are affine in it."""
    network, x_t = Network(), latents()
    times = torch.full((3,), t)
    conditional, unconditional = network(x_t, times, text(1)), network(x_t, times, text(0))
    guided = conditional + w * (conditional - unconditional)
    expected = ddim(path.prediction_type).step(guided, t, x_t).prev_sample
    result = teacher_step(network, path, x_t, times, path.previous_timestep(times), text(1), text(0), w)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_fifty_steps_are_a_run_of_diffusers_ddim(path):
    network, scheduler = Network(), ddim(path.prediction_type)
    ours = theirs = latents()
    for t in path.solver_timesteps().flip(0):
        times = t.expand(3)
        theirs = scheduler.step(network(theirs, times, text(1)), int(t), theirs).prev_sample
        ours = teacher_step(network, path, ours, times, path.previous_timestep(times), text(1), text(0), 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_perfect_teacher_follows_its_own_trajectory(path):
    """With the true noise as output, the step gives the same clean sample with less of the same noise."""
    clean, noise = latents(1), latents(2)
    t, t_prev = torch.tensor([39, 499, 999]), torch.tensor([19, 479, 979])

    def oracle(x, times, words):
        alpha, sigma = (value.reshape(-1, 1, 1, 1, 1) for value in path.coefficients(times))
        x0, eps = clean.repeat(2, 1, 1, 1, 1), noise.repeat(2, 1, 1, 1, 1)
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[path.prediction_type]

    x_t = path.add_noise(clean, noise, t)
    result = teacher_step(oracle, path, x_t, t, t_prev, text(1), text(0), torch.tensor([5.0, 10.0, 15.0]))
    torch.testing.assert_close(result, path.add_noise(clean, noise, t_prev), rtol=1e-3, atol=1e-3)


def test_half_latents_are_stepped_in_float32(path):
    x_t, t = latents().bfloat16(), torch.tensor([39, 499, 999])

    def network(x, times, words):
        assert x.dtype == torch.bfloat16
        return Network()(x.float(), times, words)

    t_prev = path.previous_timestep(t)
    result = teacher_step(network, path, x_t, t, t_prev, text(1), text(0), 5.0)
    expected = teacher_step(Network(), path, x_t.float(), t, t_prev, text(1), text(0), 5.0)
    assert torch.equal(result, expected.bfloat16())


def test_no_gradient_reaches_the_teacher(path):
    weight = torch.nn.Parameter(torch.ones(()))
    x_t = latents().requires_grad_()
    t = torch.tensor([39, 499, 999])
    result = teacher_step(lambda x, t, c: weight * x, path, x_t, t, t - 20, text(1), text(0), 5.0)
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": torch.zeros(2)}, r"w must be a number or of shape \(3,\); got \(2,\)"),
        ({"negative_text": {"states": torch.zeros(3, 5, 8)}}, "must have the keys and shapes of the text"),
        ({"negative_text": {"states": torch.zeros(1, 5, 8), "mask": torch.ones(1, 5)}}, r"got .*\(1, 5, 8\)"),
        ({"t": torch.tensor([19, 499])}, r"of shape \(6,\)"),
    ],
)
def test_mismatched_arguments_are_refused(path, changes, message):
    arguments = {
        "denoise": lambda x, t, words: x,
        "path": path,
        "x_t": latents(),
        "t": torch.tensor([19, 499, 999]),
        "text": text(1),
        "negative_text": text(0),
        "w": 5.0,
    }
    with pytest.raises(ValueError, match=message):
        guided_prediction(**{**arguments, **changes})
