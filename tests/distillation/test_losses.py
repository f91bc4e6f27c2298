"""The losses against limits, closed forms and each other."""

import pytest
import torch

from diffusers_mcm.distillation.losses import (
    DISCRIMINATOR_LOSSES,
    get_discriminator_loss,
    pseudo_huber,
    temporal_distance,
)


def logits(seed=0, shape=(6, 10)):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pseudo_huber_is_zero_at_equality_with_zero_gradient():
    a = logits().requires_grad_()
    loss = pseudo_huber(a, a.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9) and not a.grad.any()


def test_pseudo_huber_is_its_formula_and_symmetric():
    a, b = torch.tensor([0.0, 3.0]), torch.tensor([0.0, -1.0])
    assert pseudo_huber(a, b, c=3.0).item() == pytest.approx(((16 + 9) ** 0.5 - 3) / 2)
    assert pseudo_huber(logits(0), logits(1)) == pseudo_huber(logits(1), logits(0))


def test_pseudo_huber_is_the_mean_distance_for_small_c_and_squared_for_large():
    a, b = logits(0), logits(1)
    assert pseudo_huber(a, b).item() == pytest.approx((a - b).abs().mean().item(), rel=2e-3)
    c = 100.0
    assert pseudo_huber(a, b, c).item() == pytest.approx(((a - b) ** 2).mean().item() / (2 * c), rel=1e-2)


def test_pseudo_huber_is_taken_per_element_not_over_the_whole_tensor():
    a, zero = torch.full((100,), 1.0), torch.zeros(100)
    assert pseudo_huber(a, zero).item() == pytest.approx((1 + 1e-6) ** 0.5 - 0.001)


def test_pseudo_huber_gradients_are_bounded_signs():
    a = torch.tensor([5.0, -5.0]).requires_grad_()
    pseudo_huber(a, torch.zeros(2)).backward()
    torch.testing.assert_close(a.grad, torch.tensor([0.5, -0.5]))


def test_half_types_are_compared_in_float32():
    a = torch.tensor([1000.0], dtype=torch.float16)
    assert pseudo_huber(a, -a).dtype == torch.float32
    assert pseudo_huber(a, -a).item() == pytest.approx(2000, rel=1e-4)


def test_temporal_distance_is_its_formula():
    """Frames 0, 1, 3, 6, 10 against still ones: changes 1, 2, 3, 4 at lag 1, and 6, 9 at lag 3; c takes 0.001 off."""
    clip = torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0]).reshape(1, 1, 5, 1, 1).expand(2, 4, 5, 3, 3)
    expected = (2.5 + 7.5) / 2
    assert temporal_distance(clip, torch.zeros_like(clip)).item() == pytest.approx(expected, abs=2e-3)
    assert temporal_distance(clip[:, :, :3], torch.zeros(2, 4, 3, 3, 3)).item() == pytest.approx(1.5, abs=2e-3)
    assert temporal_distance(clip, clip, c=3.0).item() == 0


def test_temporal_distance_minds_what_comes_and_goes_alone():
    clip = logits(0, (2, 4, 6, 3, 3)).double()
    lasting = logits(1, (2, 4, 1, 3, 3)).expand_as(clip)
    fleeting = lasting * torch.tensor([1.0, -1.0] * 3).reshape(1, 1, 6, 1, 1)
    assert temporal_distance(clip + lasting, clip).item() == pytest.approx(0, abs=1e-6)
    assert temporal_distance(clip + fleeting, clip).item() == pytest.approx(
        2 * pseudo_huber(clip + fleeting, clip).item(), rel=2e-3
    )


def test_temporal_distance_pulls_the_frame_that_stands_out_to_where_its_neighbours_are():
    clip = torch.zeros(1, 1, 5, 1, 1)
    clip[:, :, 2] = 1.0
    clip.requires_grad_()
    temporal_distance(clip, torch.zeros_like(clip)).backward()
    # Frame 2 is in two of the four changes at lag 1, and in none of the two at lag 3.
    torch.testing.assert_close(clip.grad.flatten(), torch.tensor([0.0, -0.125, 0.25, -0.125, 0.0]), atol=1e-6, rtol=0)


def test_temporal_distance_needs_two_frames_and_one_shape():
    with pytest.raises(ValueError, match="expected 2 or more, got 1"):
        temporal_distance(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="two tensors of one shape"):
        temporal_distance(torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 3, 2, 2))


@pytest.mark.parametrize("name", sorted(DISCRIMINATOR_LOSSES))
def test_generator_wants_high_logits(name):
    fake = logits().requires_grad_()
    loss = get_discriminator_loss(name).generator(fake)
    assert loss.item() == pytest.approx(-fake.mean().item())
    loss.backward()
    torch.testing.assert_close(fake.grad, torch.full((6, 10), -1 / 60))


def test_hinge_is_per_patch():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0], [-0.5, -1.0]])
    loss = DISCRIMINATOR_LOSSES["hinge"].discriminator(real, fake, 2)
    assert loss.item() == pytest.approx((0 + 0.5) / 2 + (0 + 2.0 + 0.5 + 0) / 4)


def test_hinge_mean_puts_the_mean_over_frames_inside_the_hinge():
    real = torch.tensor([[2.0, 0.5], [0.0, 0.0]])
    fake = torch.tensor([[-3.0, 1.0], [0.0, -1.0], [4.0, 2.0], [0.0, 0.0]])  # two samples of two frames
    loss = DISCRIMINATOR_LOSSES["hinge_mean"].discriminator(real, fake, 2)
    assert loss.item() == pytest.approx((0 + 1.0) / 2 + ((1 - 0.75) + (1 + 1.5)) / 2)


def test_both_hinges_agree_where_nothing_is_clipped():
    """With all logits inside (-1, 1) the hinge is linear, so means may be taken anywhere."""
    real, fake = logits(0).tanh(), logits(1).tanh()
    losses = [row.discriminator(real, fake, 3) for row in DISCRIMINATOR_LOSSES.values()]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], 2 + fake.mean() - real.mean())


@pytest.mark.parametrize("name", sorted(DISCRIMINATOR_LOSSES))
def test_a_discriminator_that_is_sure_has_no_loss_and_no_gradient(name):
    real, fake = torch.full((2, 10), 1.5).requires_grad_(), torch.full((4, 10), -1.5).requires_grad_()
    loss = get_discriminator_loss(name).discriminator(real, fake, 2)
    loss.backward()
    assert loss.item() == 0 and not real.grad.any() and not fake.grad.any()


@pytest.mark.parametrize("name", sorted(DISCRIMINATOR_LOSSES))
def test_a_batch_is_the_mean_of_its_equal_parts(name):
    real, fake = logits(0, (4, 10)), logits(1, (8, 10))
    loss = get_discriminator_loss(name).discriminator
    parts = [loss(real[i : i + 2], fake[2 * i : 2 * i + 4], 2) for i in (0, 2)]
    torch.testing.assert_close(loss(real, fake, 2), torch.stack(parts).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pseudo_huber(torch.zeros(2), torch.zeros(1)), r"one shape; got \(2,\) and \(1,\)"),
        (lambda: pseudo_huber(torch.zeros(2), torch.zeros(2), c=0.0), "c must be positive; got 0.0"),
        (lambda: get_discriminator_loss("wgan"), r"'wgan'; valid values are \['hinge', 'hinge_mean'\]"),
        (
            lambda: DISCRIMINATOR_LOSSES["hinge_mean"].discriminator(logits(), logits(), 4),
            "6 generated frames are not a multiple of 4 frames per sample",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
