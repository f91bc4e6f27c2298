"""The projected discriminator on frozen DINOv2 features (App. C.1)."""

from ...features import PatchFeatures, TextFeatures
from .augment import (
    AUGMENTATIONS,
    CROPS,
    MIN_FRAME_AREA,
    MIN_IMAGE_AREA,
    AugmentationDraws,
    augment,
    crop_and_resize,
    draw_augmentation,
)
from .heads import DiscriminatorHeads
from .model import Discriminator, DiscriminatorOutput, ImageFeatures
from .penalty import PenaltyWeight, gradient_penalty, interpolate

__all__ = [
    "AUGMENTATIONS",
    "CROPS",
    "MIN_FRAME_AREA",
    "MIN_IMAGE_AREA",
    "AugmentationDraws",
    "Discriminator",
    "DiscriminatorHeads",
    "DiscriminatorOutput",
    "ImageFeatures",
    "PatchFeatures",
    "PenaltyWeight",
    "TextFeatures",
    "augment",
    "crop_and_resize",
    "draw_augmentation",
    "gradient_penalty",
    "interpolate",
]
