import math
from dataclasses import fields, replace

import pytest
import torch

from diffusers_mcm.distillation.discriminator.augment import (
    AugmentationDraws,
    augment,
    crop_and_resize,
    crop_boxes,
    draw_augmentation,
)
from tests.distillation.discriminator.tiny import random_tensor


def draws(count=1, **values):
    """Every number in the middle, where colour and translation change nothing, except those given."""
    numbers = {field.name: 0.5 for field in fields(AugmentationDraws)} | values
    shapes = {"crop_size": (count, 10, 2)}
    return AugmentationDraws(**{name: torch.full(shapes.get(name, (count,)), v) for name, v in numbers.items()})


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
        assert ((values >= 0) & (values < 1)).all()


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


@pytest.mark.parametrize("size", [(64, 64), (60, 80)])
def test_resized_crops_have_the_areas_shapes_and_places_of_torchvisions(size):
    height, width = size
    boxes = torch.tensor(crop_boxes(draw_augmentation(torch.Generator().manual_seed(0), 4000), *size, 0.5)).double()
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    assert 0.5 - 0.02 <= area.min() < 0.52 and 0.95 < area.max() <= 1
    assert 3 / 4 - 0.03 <= ratio.min() < 0.77 and 1.3 < ratio.max() <= 4 / 3 + 0.03
    # Rejection as there, with a generator of the test's own: sizes that do not fit are drawn again.
    generator = torch.Generator().manual_seed(1)
    areas = height * width * (0.5 + 0.5 * torch.rand(40_000, generator=generator))
    ratios = ((torch.rand(40_000, generator=generator) * 2 - 1) * math.log(4 / 3)).exp()
    ws, hs = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fit = (ws <= width) & (hs <= height)
    assert 0.3 < fit.float().mean() < 0.9
    assert area.mean() == pytest.approx((ws * hs)[fit].mean().item() / (height * width), abs=0.01)
    assert ratio.log().mean() == pytest.approx((ws / hs)[fit].log().mean().item(), abs=0.02)
    # Every place is equally likely: the middle of what is left over on both sides.
    assert (top / (height - h).clamp(min=1))[h < height].mean() == pytest.approx(0.5, abs=0.03)
    assert (left / (width - w).clamp(min=1))[w < width].mean() == pytest.approx(0.5, abs=0.03)


def test_a_resized_crop_that_never_fits_is_in_the_middle():
    assert crop_boxes(draws(crop_size=0.999), 10, 100, 1.0) == [(0, 43, 10, 13)]
    assert crop_boxes(draws(crop_size=0.999), 100, 10, 1.0) == [(43, 0, 13, 10)]
    assert crop_boxes(draws(crop_size=0.999), 10, 12, 1.0) == [(0, 0, 10, 12)]


def test_a_resized_crop_shows_its_part_of_the_image():
    """A ramp says where each pixel comes from; of the size that is asked for, the crop itself."""
    ramp = torch.linspace(-1, 1, 32).expand(3, 32, 32)[None]
    numbers = draws(crop_size=0.0, crop_x=0.999, crop_y=0.0)  # half of the area, 3 by 4
    ((top, left, height, width),) = crop_boxes(numbers, 32, 32, 0.5)
    assert (top, left, height, width) == (0, 32 - 20, 26, 20)
    seen = crop_and_resize(ramp, numbers, 10, "resized", 0.5)
    step = 2 / 31
    # Inside, where antialiasing meets no border: the centres of ten equal parts of the columns.
    expected = -1 + step * (left + (torch.arange(10) + 0.5) * width / 10 - 0.5)
    torch.testing.assert_close(seen[0, 0, 5, 1:-1], expected[1:-1], atol=1e-5, rtol=0)
    # The whole image, where area and shape say so.
    whole = draws(crop_size=0.5)
    torch.testing.assert_close(crop_and_resize(ramp, whole, 32, "resized", 1.0), ramp, atol=1e-6, rtol=0)


def test_a_resized_crop_is_linear_in_the_image_and_its_own():
    images, direction = random_tensor(3, 3, 20, 24).double(), random_tensor(3, 3, 20, 24, seed=1).double()
    weight, numbers = random_tensor(3, 3, 12, 12, seed=2).double(), AugmentationDraws.cat(sample_draws(3))

    def value(x):
        return (crop_and_resize(x, numbers, 12, "resized") * weight).sum()

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(value(images), images)
    torch.testing.assert_close((gradient * direction).sum(), (value(images + direction) - value(images)))
    whole = crop_and_resize(images, numbers, 12, "resized")
    for index in range(3):
        alone = crop_and_resize(images[index : index + 1], numbers[index : index + 1], 12, "resized")
        assert torch.equal(alone, whole[index : index + 1])


def test_without_crop_images_are_scaled_whole():
    images = random_tensor(1, 3, 20, 30)
    whole = crop_and_resize(images, draws(crop=0.0), 10, "none")
    torch.testing.assert_close(whole, images.reshape(1, 3, 10, 2, 10, 3).mean((3, 5)), atol=1e-6, rtol=0)


def test_errors():
    with pytest.raises(ValueError, match="Unknown crop 'centre'; choose from random, resized, none"):
        crop_and_resize(torch.zeros(1, 3, 8, 8), draws(), 4, "centre")
    with pytest.raises(ValueError, match=r"images of shape \(N, 3, H, W\), got \(2, 3, 4, 8, 8\)"):
        augment(torch.zeros(2, 3, 4, 8, 8), draws(2))
    with pytest.raises(ValueError, match="2 images, 3 rows"):
        augment(torch.zeros(2, 3, 8, 8), draws(3))
    with pytest.raises(ValueError, match="2 images, 3 rows"):
        crop_and_resize(torch.zeros(2, 3, 8, 8), draws(3), 4)
    with pytest.raises(ValueError, match="Unknown augmentation 'flip'; choose from colour, translation, cutout"):
        augment(torch.zeros(1, 3, 8, 8), draws(), ("flip",))
