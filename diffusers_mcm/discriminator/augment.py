"""Differentiable augmentation of what the discriminator sees (App. C.1).

Every decision is taken from uniform numbers drawn beforehand, one row per image, so a batch gives the same result
however it is split. The numbers do not depend on the image's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

SHIFT_RATIO = 0.125  # largest translation, as a part of the side
CUTOUT_RATIO = 0.2  # side of the removed square, as a part of the side
CROP_PROBABILITY = 0.5


@dataclass(frozen=True)
class AugmentationDraws:
    """Uniform numbers in [0, 1), each field `(N,)` float32 on the CPU."""

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
    uniforms = torch.rand(
        num_images, len(fields(AugmentationDraws)), generator=generator, device=generator.device, dtype=torch.float32
    )
    return AugmentationDraws(*uniforms.cpu().unbind(1))


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


AUGMENTATIONS = {"colour": adjust_colour, "translation": translate, "cutout": cut_out}


def check_images(images: torch.Tensor, draws: AugmentationDraws | None = None) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected images of shape (N, 3, H, W), got {tuple(images.shape)}.")
    if draws is not None and len(draws) != len(images):
        raise ValueError(f"Expected one row of augmentation draws per image: {len(images)} images, {len(draws)} rows.")


def augment(
    images: torch.Tensor, draws: AugmentationDraws, policy: Sequence[str] = tuple(AUGMENTATIONS)
) -> torch.Tensor:
    """Images `(N, 3, H, W)` in [-1, 1] → the same shape in float32, differentiable; colour may leave [-1, 1]."""
    check_images(images, draws)
    unknown = [name for name in policy if name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"Unknown augmentation {unknown[0]!r}; choose from {', '.join(AUGMENTATIONS)}.")
    images = images.float()
    for name in policy:
        images = AUGMENTATIONS[name](images, draws)
    return images


def crop_and_resize(images: torch.Tensor, draws: AugmentationDraws, size: int) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 3, size, size)`: where larger, a random crop for half of the images; else area resize."""
    check_images(images, draws)
    height, width = images.shape[-2:]
    resized = images if (height, width) == (size, size) else F.interpolate(images, (size, size), mode="area")
    if min(height, width) < size or max(height, width) == size:
        return resized
    tops = _integers(draws.crop_y, height - size + 1).tolist()
    lefts = _integers(draws.crop_x, width - size + 1).tolist()
    crops = torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(images, tops, lefts)])
    chosen = (draws.crop < CROP_PROBABILITY).to(images.device)
    return torch.where(chosen[:, None, None, None], crops, resized)
