import math

import pytest
import torch

from diffusers_mcm.distillation.discriminator.penalty import (
    PenaltyWeight,
    gradient_penalty,
    interpolate,
)
from tests.distillation.discriminator.tiny import BLOCKS, FEATURE_DIM, NUM_PATCHES, TEXT_DIM, random_tensor, tiny_heads


def inputs(count=2):
    features = [random_tensor(count, NUM_PATCHES, FEATURE_DIM, seed=seed) for seed in BLOCKS]
    return features, random_tensor(count, TEXT_DIM, seed=99)


def test_linear_head_closed_form():
    features, text = inputs()
    weights = [random_tensor(FEATURE_DIM, seed=10 + index).requires_grad_() for index in range(len(BLOCKS))]

    def heads(blocks, text):  # one logit per patch, w·f scaled by the first text channel
        return torch.cat([tokens @ weight for tokens, weight in zip(blocks, weights)], 1) * text[:, :1]

    penalty = gradient_penalty(heads, features, text)
    length = math.sqrt(NUM_PATCHES) * torch.cat(weights).norm()
    expected = (text[:, 0].abs() * length - 1) ** 2
    torch.testing.assert_close(penalty, expected)
    # d/dw (s·|w| − 1)² = 2 (s·|w| − 1) s·w/|w|
    penalty.sum().backward()
    scale = text[:, 0].abs() * math.sqrt(NUM_PATCHES)
    factor = (2 * (scale * torch.cat(weights).norm() - 1) * scale).sum() / torch.cat(weights).norm()
    torch.testing.assert_close(weights[1].grad, factor * weights[1].detach(), rtol=1e-4, atol=1e-4)


def test_heads_gradient_agrees_with_a_finite_difference():
    heads, (features, text) = tiny_heads(), inputs()
    weight = heads.heads[1].residual.conv.weight
    gradient_penalty(heads, features, text).mean().backward()
    direction = weight.grad / weight.grad.norm()
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):  # small: no LeakyReLU may change sides in between
            weight.add_(step * direction)
            with torch.enable_grad():
                values.append(gradient_penalty(heads, features, text).mean().item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(weight.grad.norm().item(), rel=5e-3)


def test_one_image_at_a_time_is_the_same():
    heads, (features, text) = tiny_heads(), inputs(3)
    whole = gradient_penalty(heads, features, text)
    alone = [gradient_penalty(heads, [t[i : i + 1] for t in features], text[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=1e-5)  # float32: kernels differ with the batch


def test_features_are_constants():
    heads, (features, text) = tiny_heads(), inputs()
    features = [tokens.requires_grad_() for tokens in features]
    gradient_penalty(heads, features, text.requires_grad_()).mean().backward()
    assert all(tokens.grad is None for tokens in features) and text.grad is None


def test_a_zero_gradient_is_not_a_nan():
    heads, (features, text) = tiny_heads(), inputs()
    penalty = gradient_penalty(heads, features, text * 0)
    penalty.sum().backward()
    assert penalty.tolist() == [1, 1]
    assert all(p.grad is None or p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_it(dtype):
    heads, (features, text) = tiny_heads(), inputs()
    exact = gradient_penalty(heads, features, text)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(gradient_penalty(heads, features, text), exact)


def test_interpolation():
    real, fake = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    mixed = interpolate(real, fake, torch.tensor([0.25, 1.0]))
    assert mixed[0].eq(0.25).all() and mixed[1].eq(1).all()
    text = interpolate(torch.ones(2, 5), torch.zeros(2, 5), torch.tensor([0.25, 1.0]))
    assert text.tolist() == [[0.25] * 5, [1] * 5]


def test_errors():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        interpolate(torch.ones(2, 3), torch.ones(1, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"interpolation weights of shape \(2,\), got \(3,\)"):
        interpolate(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))


def test_the_weight_grows_at_most_once_in_500_steps_and_for_good():
    weight = PenaltyWeight(1e-5, 5.0)
    grown = []
    for step in range(1, 1701):
        before = weight.value
        weight.follow(99.9 if step < 10 or 700 < step < 1600 else 100.0, step)
        if weight.value != before:
            assert weight.value == pytest.approx(5 * before)
            grown.append(step)
    assert grown == [10, 510, 1600] and weight.value == pytest.approx(125e-5)

    again = PenaltyWeight(1e-5, 5.0)
    again.load_state_dict(weight.state_dict())
    for one in (weight, again):
        one.follow(1e6, 2099)
        assert one.value == pytest.approx(125e-5)
        one.follow(1e6, 2100)
        assert one.value == pytest.approx(625e-5)


def test_a_growth_of_one_keeps_the_weight():
    weight = PenaltyWeight(1e-3, 1.0)
    weight.follow(1e6, 1)
    assert weight.state_dict() == {"value": 1e-3, "grown_at": None}
