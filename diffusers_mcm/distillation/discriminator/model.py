"""The projected discriminator: frozen features, trainable heads, and what a training step asks of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...features import PatchFeatures, TextFeatures
from .augment import AUGMENTATIONS, MIN_IMAGE_AREA, AugmentationDraws, augment, crop_and_resize
from .heads import DiscriminatorHeads
from .penalty import gradient_penalty, interpolate


class ImageFeatures(NamedTuple):
    """What the discriminator knows of a batch of images.

    pixels: augmented, at the frozen network's size, `(N, 3, S, S)` float32, nominally in [-1, 1].
    blocks: patch tokens, `(N, P, C)` float32 per block.
    """

    pixels: torch.Tensor
    blocks: list[torch.Tensor]

    def detach(self) -> "ImageFeatures":
        return ImageFeatures(self.pixels.detach(), [tokens.detach() for tokens in self.blocks])


class DiscriminatorOutput(NamedTuple):
    """Logits `(N, blocks · P)` and the gradient penalty `(N,)` per image, or None if it was not asked for."""

    fake_logits: torch.Tensor
    real_logits: torch.Tensor
    penalty: torch.Tensor | None


class Discriminator(nn.Module):
    """One training step runs the frozen network three times, on generated, real and interpolated images.

    `extract` gives the features of images, `generator_logits` the student's loss, and a call the discriminator's own,
    of which gradients reach the heads only; `heads.update_spectral_norm()` follows each step of the optimiser.

    The networks for images and text are frozen; the heads are trained, the only weights that need saving.
    `augmentation` are names out of `AUGMENTATIONS`, in the order in which they are applied, `crop` is one out of
    `CROPS`, `min_crop_area` a share of the image's area, for the crop "resized".
    """

    def __init__(
        self,
        features: PatchFeatures,
        heads: DiscriminatorHeads,
        text: TextFeatures,
        augmentation: Sequence[str] = tuple(AUGMENTATIONS),
        crop: str = "random",
        min_crop_area: float = MIN_IMAGE_AREA,
    ):
        super().__init__()
        self.augmentation, self.crop, self.min_crop_area = tuple(augmentation), crop, min_crop_area
        self.features, self.heads, self.text = features, heads, text

    @classmethod
    def with_fresh_heads(
        cls, features: PatchFeatures, text: TextFeatures, generator: torch.Generator | None = None, **options: Any
    ) -> "Discriminator":
        """Frozen networks with float32 heads that are drawn from `generator`; `options` are the constructor's."""
        heads = DiscriminatorHeads(len(features.blocks), features.feature_dim, text.text_dim, generator=generator)
        return cls(features, heads, text, **options)

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts → `(N, D)` float32."""
        return self.text(prompts)

    def extract(self, images: torch.Tensor, draws: AugmentationDraws) -> ImageFeatures:
        """Images `(N, 3, H, W)` in [-1, 1], augmented, through the frozen network. Differentiable in the images."""
        images, size = augment(images, draws, self.augmentation), self.features.input_size
        pixels = crop_and_resize(images, draws, size, self.crop, self.min_crop_area)
        return ImageFeatures(pixels, self.features(pixels))

    def generator_logits(self, fake: ImageFeatures, text: torch.Tensor) -> torch.Tensor:
        """Logits for the generator's loss: the heads' weights enter as constants, so they collect no gradient."""
        constants = {name: parameter.detach() for name, parameter in self.heads.named_parameters()}
        return torch.func.functional_call(self.heads, constants, (fake.blocks, text))

    def forward(
        self,
        fake: ImageFeatures,
        fake_text: torch.Tensor,
        real: ImageFeatures,
        real_text: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> DiscriminatorOutput:
        """All of the discriminator's own step in one call, as a data-parallel wrapper wants it.

        Generated images are as `generator_logits` saw them; texts are `(N, D)`, and `weights` `(N,)` the interpolation
        draws for the gradient penalty, which is left out without them.
        """
        fake, real = fake.detach(), real.detach()
        penalty = None
        if weights is not None:
            # A point between a real pair (image, text) and a generated one; where both have one text, it stays that.
            pixels = interpolate(real.pixels, fake.pixels, weights)
            text = interpolate(real_text, fake_text, weights)
            with torch.no_grad():
                blocks = self.features(pixels)
            penalty = gradient_penalty(self.heads, blocks, text)
        return DiscriminatorOutput(self.heads(fake.blocks, fake_text), self.heads(real.blocks, real_text), penalty)
