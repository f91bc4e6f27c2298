from dataclasses import fields, replace

import pytest
import torch

from diffusers_mcm.discriminator.augment import AugmentationDraws, augment, crop_and_resize, draw_augmentation
from tests.discriminator.tiny import random_tensor


def draws(count=1, **values):
    """Every number in the middle, where colour and translation change nothing, except those given."""
    numbers = {field.name: 0.5 for field in fields(AugmentationDraws)} | values
    return AugmentationDraws(**{name: torch.full((count,), value) for name, value in numbers.items()})


def sample_draws(count):
    return [draw_augmentation(torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_draws_come_from_the_samples_own_generator():
    one, other = sample_draws(2)
    both = AugmentationDraws.cat([one, other])
    assert len(both) == 2
    again = draw_augmentation(torch.Generator().manual_seed(1))
    for field in fields(AugmentationDraws):
        values = getattr(both[1:], field.name)
        assert torch.equal(values, getattr(again, field.name))
        assert not torch.equal(values, getattr(one, field.name))
        assert 0 <= values.item() < 1


def test_frames_of_one_sample_get_different_draws():
    frames = draw_augmentation(torch.Generator().manual_seed(0), 2)
    assert frames.brightness[0] != frames.brightness[1]


def test_middle_draws_change_nothing():
    images = random_tensor(2, 3, 16, 24)
    torch.testing.assert_close(augment(images, draws(2), ("colour", "translation")), images, atol=1e-6, rtol=0)
    assert torch.equal(augment(images, draws(2, brightness=0.1), ()), images)


def test_colour_closed_forms():
    images = random_tensor(1, 3, 8, 8)
    brighter = augment(images, draws(brightness=0.75), ("colour",))
    torch.testing.assert_close(brighter, images + 0.25, atol=1e-6, rtol=0)
    grey = augment(images, draws(saturation=0.0), ("colour",))
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images), atol=1e-6, rtol=0)
    flatter = augment(images, draws(contrast=0.0), ("colour",))
    torch.testing.assert_close(flatter.std(), images.std() / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(flatter.mean(), images.mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("uniform, shift", [(0.0, -2), (0.999999, 2)])
def test_translation_moves_by_an_eighth_at_most(uniform, shift):
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8, 5] = 1
    moved = augment(images, draws(shift_x=uniform), ("translation",))
    assert moved[0, 0].nonzero().tolist() == [[8, 5 + shift]]
    moved = augment(images, draws(shift_y=uniform), ("translation",))
    assert moved[0, 0].nonzero().tolist() == [[8 + shift, 5]]


def test_translation_fills_with_zeros():
    moved = augment(torch.ones(1, 3, 16, 16), draws(shift_x=0.0, shift_y=0.99), ("translation",))
    assert moved[0, 0, 2:, :14].eq(1).all() and moved.sum() == 3 * 14 * 14


def test_cutout_removes_one_box():
    cut = augment(torch.ones(1, 3, 20, 40), draws(), ("cutout",))[0, 0]
    rows, columns = (cut == 0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 11, 16, 23)
    assert (cut == 0).sum() == 4 * 8
    # At the border a part of the box lies outside.
    corner = augment(torch.ones(1, 3, 20, 40), draws(cutout_x=0.0, cutout_y=0.0), ("cutout",))[0, 0]
    assert (corner == 0).sum() == 2 * 4


def test_gradient_agrees_with_a_finite_difference():
    images, direction = random_tensor(2, 3, 12, 12), random_tensor(2, 3, 12, 12, seed=1)
    weight = random_tensor(2, 3, 8, 8, seed=2)
    numbers = AugmentationDraws.cat(sample_draws(2))
    numbers = replace(numbers, crop=torch.tensor([0.1, 0.9]))  # one crop, one resize

    def value(x):
        return (crop_and_resize(augment(x, numbers), numbers, 8) * weight).sum()

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(value(images), images)
    slope = (value(images + direction) - value(images - direction)) / 2  # exact: the augmentation is affine
    assert slope.abs() > 0.1
    torch.testing.assert_close((gradient * direction).sum(), slope, atol=1e-4, rtol=1e-4)


def test_batch_may_be_split():
    images, numbers = random_tensor(4, 3, 20, 20), AugmentationDraws.cat(sample_draws(4))
    whole = crop_and_resize(augment(images, numbers), numbers, 16)
    for index, number in enumerate(sample_draws(4)):
        alone = crop_and_resize(augment(images[index : index + 1], number), number, 16)
        torch.testing.assert_close(whole[index : index + 1], alone, atol=1e-6, rtol=0)


def test_crop_is_a_part_of_the_image_and_takes_half_of_them():
    images = random_tensor(1, 3, 20, 30)
    crop = crop_and_resize(images, draws(crop=0.49, crop_x=0.999, crop_y=0.0), 16)
    assert torch.equal(crop, images[..., :16, 14:])
    resized = crop_and_resize(images, draws(crop=0.5), 10)
    torch.testing.assert_close(resized, images.reshape(1, 3, 10, 2, 10, 3).mean((3, 5)), atol=1e-6, rtol=0)


def test_small_images_are_never_cropped():
    images = random_tensor(1, 3, 8, 8)
    assert torch.equal(crop_and_resize(images, draws(crop=0.0), 8), images)
    enlarged = crop_and_resize(images, draws(crop=0.0), 16)
    assert torch.equal(enlarged, images.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_errors():
    with pytest.raises(ValueError, match=r"images of shape \(N, 3, H, W\), got \(2, 3, 4, 8, 8\)"):
        augment(torch.zeros(2, 3, 4, 8, 8), draws(2))
    with pytest.raises(ValueError, match="2 images, 3 rows"):
        augment(torch.zeros(2, 3, 8, 8), draws(3))
    with pytest.raises(ValueError, match="2 images, 3 rows"):
        crop_and_resize(torch.zeros(2, 3, 8, 8), draws(3), 4)
    with pytest.raises(ValueError, match="Unknown augmentation 'flip'; choose from colour, translation, cutout"):
        augment(torch.zeros(1, 3, 8, 8), draws(), ("flip",))
