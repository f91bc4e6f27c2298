"""Differentiable augmentation of what the discriminator sees (App. C.1).

Every decision is taken from uniform numbers drawn beforehand, one row per image, so a batch gives the same result
however it is split. The numbers do not depend on the image's size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F

from ...features import check_images

SHIFT_RATIO = 0.125  # largest translation, as a share of the side
CUTOUT_RATIO = 0.2  # side of the removed square, as a share of the side
CROP_PROBABILITY = 0.5
CROP_RATIOS = (3 / 4, 4 / 3)  # width / height of a resized crop, uniform on a logarithmic scale
CROP_ATTEMPTS = 10  # sizes drawn for a resized crop; the first that fits into the image is taken
# Smallest area of a resized crop, as a share of the image's: the authors' for frames of videos, and for images.
MIN_FRAME_AREA, MIN_IMAGE_AREA = 0.75, 0.5


@dataclass(frozen=True)
class AugmentationDraws:
    """Uniform numbers in [0, 1), float32 on the CPU, each field `(N,)` but `crop_size`: `(N, CROP_ATTEMPTS, 2)`."""

    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor
    cutout_x: torch.Tensor
    cutout_y: torch.Tensor
    crop: torch.Tensor
    crop_x: torch.Tensor
    crop_y: torch.Tensor
    crop_size: torch.Tensor  # area and shape of a resized crop

    def __len__(self) -> int:
        return len(self.brightness)

    def __getitem__(self, index: slice) -> "AugmentationDraws":
        return AugmentationDraws(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def cat(cls, draws: Sequence["AugmentationDraws"]) -> "AugmentationDraws":
        """The draws of several samples as those of one batch, in order."""
        return cls(*(torch.cat([getattr(draw, field.name) for draw in draws]) for field in fields(cls)))


def draw_augmentation(generator: torch.Generator, num_images: int = 1) -> AugmentationDraws:
    """Draws for the `num_images` images of one sample, from that sample's own generator."""
    uniform = partial(torch.rand, generator=generator, dtype=torch.float32)
    numbers = uniform(num_images, len(fields(AugmentationDraws)) - 1).unbind(1)
    return AugmentationDraws(*(*numbers, uniform(num_images, CROP_ATTEMPTS, 2)))


def _integers(uniforms: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform integers in [0, count); float64, or the product could round up to `count`."""
    return (uniforms.double() * count).floor().long()


def adjust_colour(images: torch.Tensor, draws: AugmentationDraws) -> torch.Tensor:
    """Brightness ± 0.5, then saturation × [0, 2), then contrast × [0.5, 1.5)."""

    def per_image(uniforms):
        return uniforms.to(images)[:, None, None, None]  # (N, 1, 1, 1)

    images = images + (per_image(draws.brightness) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * per_image(draws.saturation))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (per_image(draws.contrast) + 0.5)


def translate(images: torch.Tensor, draws: AugmentationDraws) -> torch.Tensor:
    """Shift by whole pixels, at most an eighth of the side either way; what comes in is zero (mid-grey)."""
    height, width = images.shape[-2:]
    max_x, max_y = int(width * SHIFT_RATIO + 0.5), int(height * SHIFT_RATIO + 0.5)
    shifts_x = (_integers(draws.shift_x, 2 * max_x + 1) - max_x).tolist()
    shifts_y = (_integers(draws.shift_y, 2 * max_y + 1) - max_y).tolist()
    # A negative pad crops: what leaves on one side makes room for the zeros on the other.
    return torch.stack([F.pad(image, (x, -x, y, -y)) for image, x, y in zip(images, shifts_x, shifts_y)])


def cut_out(images: torch.Tensor, draws: AugmentationDraws) -> torch.Tensor:
    """Set one box of a fifth of the sides to zero (mid-grey); its centre is anywhere in the image."""

    def inside(uniforms, side):  # (N, side), true where the box covers the row or column
        size = int(side * CUTOUT_RATIO + 0.5)
        start = _integers(uniforms, side + 1 - size % 2) - size // 2
        offset = torch.arange(side) - start[:, None]
        return (offset >= 0) & (offset < size)

    height, width = images.shape[-2:]
    box = inside(draws.cutout_y, height)[:, :, None] & inside(draws.cutout_x, width)[:, None, :]
    return images * (~box).to(images)[:, None]


def _check(images: torch.Tensor, draws: AugmentationDraws) -> None:
    """`ValueError` unless these are images `(N, 3, H, W)` with a row of draws for each."""
    check_images(images)
    if len(draws) != len(images):
        raise ValueError(f"Expected one row of augmentation draws per image: {len(images)} images, {len(draws)} rows.")


AUGMENTATIONS = {"colour": adjust_colour, "translation": translate, "cutout": cut_out}


def augment(
    images: torch.Tensor, draws: AugmentationDraws, policy: Sequence[str] = tuple(AUGMENTATIONS)
) -> torch.Tensor:
    """Images `(N, 3, H, W)` in [-1, 1] → the same shape in float32, differentiable; colour may leave [-1, 1]."""
    _check(images, draws)
    images = images.float()
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"Unknown augmentation {name!r}; choose from {', '.join(AUGMENTATIONS)}.")
        images = AUGMENTATIONS[name](images, draws)
    return images


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 3, size, size)`, each pixel the mean of the area that it covers."""
    return images if images.shape[-2:] == (size, size) else F.interpolate(images, (size, size), mode="area")


def random_crop(images: torch.Tensor, draws: AugmentationDraws, size: int, min_area: float) -> torch.Tensor:
    """Where the images are larger than `size`, a crop of that size for half of them; else resized whole."""
    height, width = images.shape[-2:]
    resized = resize(images, size)
    if min(height, width) < size or max(height, width) == size:
        return resized
    tops = _integers(draws.crop_y, height - size + 1).tolist()
    lefts = _integers(draws.crop_x, width - size + 1).tolist()
    crops = torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(images, tops, lefts)])
    chosen = (draws.crop < CROP_PROBABILITY).to(images.device)
    return torch.where(chosen[:, None, None, None], crops, resized)


def crop_boxes(draws: AugmentationDraws, height: int, width: int, min_area: float) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of a resized crop of each image, drawn as torchvision's RandomResizedCrop does.

    The area is uniform from `min_area` of the image's to all of it. Where no attempt fits, the box is the largest in
    the middle whose shape is within `CROP_RATIOS`.
    """
    narrowest, widest = CROP_RATIOS
    area, shape = draws.crop_size.double().unbind(-1)  # (N, attempts)
    area = height * width * (min_area + (1 - min_area) * area)
    ratio = narrowest * (widest / narrowest) ** shape
    heights, widths = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    boxes = []
    for row, first in enumerate(fits.long().argmax(1).tolist()):
        if fits[row, first]:
            box = int(heights[row, first]), int(widths[row, first])
            top = int(_integers(draws.crop_y[row], height - box[0] + 1))
            left = int(_integers(draws.crop_x[row], width - box[1] + 1))
        else:
            box = min(height, round(width / narrowest)), min(width, round(height * widest))
            top, left = (height - box[0]) // 2, (width - box[1]) // 2
        boxes.append((top, left, *box))
    return boxes


def resized_crop(images: torch.Tensor, draws: AugmentationDraws, size: int, min_area: float) -> torch.Tensor:
    """A crop of another place, size and shape of every image, scaled to `size` bilinearly with antialiasing."""
    boxes = crop_boxes(draws, images.shape[-2], images.shape[-1], min_area)
    crops = [image[None, :, y : y + h, x : x + w] for image, (y, x, h, w) in zip(images, boxes)]
    return torch.cat([F.interpolate(crop, (size, size), mode="bilinear", antialias=True) for crop in crops])


CROPS: dict[str, Callable[[torch.Tensor, AugmentationDraws, int, float], torch.Tensor]] = {
    "random": random_crop,
    "resized": resized_crop,
    "none": lambda images, draws, size, min_area: resize(images, size),
}


def crop_and_resize(
    images: torch.Tensor, draws: AugmentationDraws, size: int, crop: str = "random", min_area: float = MIN_IMAGE_AREA
) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 3, size, size)`, differentiable; `crop` is out of `CROPS`, `min_area` for "resized"."""
    _check(images, draws)
    if crop not in CROPS:
        raise ValueError(f"Unknown crop {crop!r}; choose from {', '.join(CROPS)}.")
    return CROPS[crop](images, draws, size, min_area)
