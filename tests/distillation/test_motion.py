"""Each motion representation on latents whose motion is known."""

import copy
import math

import pytest
import torch

from diffusers_mcm.distillation.motion import (
    MOTION_REPRESENTATIONS,
    FrequencyBand,
    LearnableMotion,
    build_motion,
    update_ema,
)

SHAPE = (2, 4, 6, 8, 8)


def latents(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def static_video():
    return latents(shape=(2, 4, 1, 8, 8)).expand(SHAPE).contiguous()


def translated_video(shift=1):
    """Noise that moves `shift` pixels to the right from frame to frame, around the edge."""
    first = latents(shape=(2, 64, 1, 8, 8))
    return torch.cat([first.roll(shift * frame, dims=-1) for frame in range(6)], dim=2)


def wave(frames=16, size=16, t=0, h=0, w=0):
    """A cosine with that many periods along each axis, (1, 1, T, H, W)."""
    axes = [torch.arange(n) * (2 * math.pi * k / n) for n, k in ((frames, t), (size, h), (size, w))]
    return torch.cos(axes[0][:, None, None] + axes[1][:, None] + axes[2])[None, None]


def test_the_table_holds_the_six_of_the_paper():
    assert set(MOTION_REPRESENTATIONS) == {"raw", "diff", "corr", "low", "high", "learnable"}


@pytest.mark.parametrize("name", sorted(MOTION_REPRESENTATIONS))
def test_samples_do_not_mix_and_gradients_pass(name):
    motion = build_motion(name, channels=4)
    if name == "learnable":
        torch.nn.init.normal_(motion.conv_out.weight, generator=torch.Generator().manual_seed(1))
    x = latents().requires_grad_()
    result = motion(x)
    assert len(result) == 2 and result.dtype == torch.float32
    torch.testing.assert_close(result[1:], motion(x[1:]))
    (result[0] ** 2).sum().backward()
    assert x.grad[0].abs().sum() > 0 and not x.grad[1].any()


@pytest.mark.parametrize("name", sorted(MOTION_REPRESENTATIONS))
def test_only_the_learnable_one_has_parameters(name):
    assert bool(list(build_motion(name, channels=4).parameters())) == (name == "learnable")


@pytest.mark.parametrize("name", sorted(MOTION_REPRESENTATIONS))
def test_half_precision_latents_keep_their_type(name):
    result = build_motion(name, channels=4).to(torch.bfloat16)(latents().bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), build_motion(name, 4)(latents().bfloat16().float()), rtol=0.1, atol=0.1)


def test_raw_is_the_latents_themselves():
    x = latents()
    assert build_motion("raw", 4)(x) is x


def test_difference_of_a_static_video_is_zero():
    difference = build_motion("diff", 4)(static_video())
    assert difference.shape == (2, 4, 5, 8, 8) and not difference.any()


def test_difference_of_a_steady_change_is_its_speed_and_forgets_looks():
    ramp = torch.arange(6.0).reshape(1, 1, 6, 1, 1) * 0.25
    torch.testing.assert_close(build_motion("diff", 4)(static_video() + ramp), torch.full((2, 4, 5, 8, 8), 0.25))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_correlation_peaks_where_the_picture_went(shift):
    correlation = build_motion("corr", 64)(translated_video(shift))
    assert correlation.shape == (2, 5, 8, 8, 8, 8)
    best = correlation.flatten(-2).argmax(-1)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    expected = rows * 8 + (columns + shift) % 8
    assert torch.equal(best, expected.expand(2, 5, 8, 8))


def test_correlation_is_the_scaled_dot_product():
    x = latents()
    correlation = build_motion("corr", 4)(x)
    expected = (x[1, :, 2, 3, 4] * x[1, :, 3, 5, 6]).sum() / 2
    torch.testing.assert_close(correlation[1, 2, 3, 4, 5, 6], expected)


@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 5, 7, 9), (1, 1, 1, 4, 4)])
def test_low_and_high_add_up_to_the_latents(shape):
    x = latents(shape=shape)
    torch.testing.assert_close(build_motion("low", 4)(x) + build_motion("high", 4)(x), x)


def test_a_still_even_picture_is_all_low():
    x = torch.full(SHAPE, 3.0)
    torch.testing.assert_close(build_motion("low", 4)(x), x)
    torch.testing.assert_close(build_motion("high", 4)(x), torch.zeros(SHAPE))


@pytest.mark.parametrize("axes", [{"t": 1}, {"h": 1}, {"w": 1}, {"w": 2}, {"t": 3, "w": 1}, {"t": 8, "h": 8, "w": 8}])
def test_filter_scales_a_wave_by_the_butterworth_response(axes):
    """Waves go through unchanged but for the gain 1 / (1 + (f / 0.25)^8), f in units of the Nyquist frequency."""
    f_squared = sum((periods / 8) ** 2 for periods in axes.values())
    gain = 1 / (1 + (f_squared / 0.25**2) ** 4)
    x = wave(**axes)
    torch.testing.assert_close(build_motion("low", 1)(x), gain * x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(build_motion("high", 1)(x), (1 - gain) * x, rtol=1e-4, atol=1e-5)


def test_half_the_amplitude_passes_at_the_stop_frequency():
    assert FrequencyBand("low").response((16, 16, 16))[2, 0, 0] == pytest.approx(0.5)
    assert FrequencyBand("low", temporal_stop=0.5).response((16, 16, 16))[4, 0, 0] == pytest.approx(0.5)
    assert FrequencyBand("high", spatial_stop=0.5).response((16, 16, 16))[0, 0, 4] == pytest.approx(0.5)


def test_head_is_the_identity_at_first():
    assert torch.equal(LearnableMotion(channels=4)(latents()), latents())


def test_head_equals_its_formula_frame_by_frame():
    head = LearnableMotion(channels=4)
    torch.nn.init.normal_(head.conv_out.weight, generator=torch.Generator().manual_seed(1))
    x, silu = latents(), torch.nn.functional.silu
    result = head(x)
    for frame in range(6):
        picture = x[:, :, frame]
        hidden = torch.einsum("oc,bchw->bohw", head.conv_in.weight[:, :, 0, 0], silu(picture))
        hidden = hidden + head.conv_in.bias[:, None, None]
        groups = hidden.reshape(2, 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
        hidden = silu(((groups - mean) / (variance + 1e-5).sqrt()).reshape(hidden.shape))
        expected = picture + torch.einsum("oc,bchw->bohw", head.conv_out.weight[:, :, 0, 0], hidden)
        torch.testing.assert_close(result[:, :, frame], expected, rtol=1e-4, atol=1e-4)


def test_head_sees_one_frame_at_a_time():
    head = LearnableMotion(channels=4)
    torch.nn.init.normal_(head.conv_out.weight, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(head(latents()[:, :, order]), head(latents())[:, :, order])


def test_head_learns_from_the_first_step():
    head = LearnableMotion(channels=4)
    (head(latents()) ** 2).mean().backward()
    assert head.conv_out.weight.grad.abs().sum() > 0 and head.conv_out.bias.grad.abs().sum() > 0


def test_moving_average_has_its_closed_form():
    """After n steps towards a constant source, the distance has shrunk by decay^n."""
    source, target = LearnableMotion(4), LearnableMotion(4)
    start = copy.deepcopy(target)
    for _ in range(10):
        update_ema(target, source, decay=0.95)
    for end, begin, goal in zip(target.parameters(), start.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(end - goal, 0.95**10 * (begin - goal), rtol=1e-4, atol=1e-6)


def test_moving_average_of_a_moving_source_is_the_geometric_sum():
    target, values = torch.nn.Linear(1, 1, bias=False), [3.0, -1.0, 4.0]
    torch.nn.init.constant_(target.weight, 2.0)
    source = copy.deepcopy(target)
    for value in values:
        torch.nn.init.constant_(source.weight, value)
        update_ema(target, source)
    expected = 0.95**3 * 2.0 + sum(0.05 * 0.95 ** (2 - i) * value for i, value in enumerate(values))
    assert target.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 5.0), (1.0, 2.0)])
def test_moving_average_limits(decay, expected):
    target, source = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(target.weight, 2.0)
    torch.nn.init.constant_(source.weight, 5.0)
    update_ema(target, source, decay)
    assert target.weight.item() == expected and source.weight.item() == 5.0


def test_moving_average_copies_buffers():
    target, source = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    source.running_mean += 3
    update_ema(target, source)
    assert torch.equal(target.running_mean, source.running_mean)


def test_moving_average_takes_no_gradient_and_leaves_the_target_frozen():
    source, target = LearnableMotion(4), LearnableMotion(4).requires_grad_(False)
    update_ema(target, source)
    assert not any(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_motion("flow", 4),
            r"'flow'; valid values are \['corr', 'diff', 'high', 'learnable', 'low'",
        ),
        (lambda: build_motion("diff", 4)(latents()[:, :, :1]), "'diff' needs at least 2 frames; got 1"),
        (lambda: build_motion("corr", 4)(latents()[:, :, :1]), "'corr' needs at least 2 frames; got 1"),
        (lambda: build_motion("learnable", 3)(latents()), "for 3 channels; got 4"),
        (lambda: LearnableMotion(4, hidden=48), "multiple of the 32 normalisation groups; got 48"),
        (lambda: FrequencyBand("middle"), r"'middle'; valid values are \['high', 'low'\]"),
        (lambda: FrequencyBand("low", spatial_stop=0.0), "got order 4, spatial_stop 0.0, temporal_stop 0.25"),
        (lambda: update_ema(LearnableMotion(4), LearnableMotion(4), 1.5), "between 0 and 1; got 1.5"),
        (lambda: update_ema(LearnableMotion(4), LearnableMotion(3)), "two modules with the same parameters"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
