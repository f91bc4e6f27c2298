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
    """Logits `(N, blocks · P)` and the gradient penalty `(N,)` per image, or None if it was not asked for.

    Those of changes, which are logits of the same shape, are None without pairs of frames.
    """

    fake_logits: torch.Tensor
    real_logits: torch.Tensor
    penalty: torch.Tensor | None
    fake_change_logits: torch.Tensor | None = None
    real_change_logits: torch.Tensor | None = None


class Changes(NamedTuple):
    """How the patch tokens of generated and of real videos change from one frame to another, `(N, P, C)` per block."""

    fake: list[torch.Tensor]
    real: list[torch.Tensor]
    text: torch.Tensor  # (N, D), of the videos: both sides have the same


def change(one: ImageFeatures, other: ImageFeatures) -> list[torch.Tensor]:
    """The difference of two images' patch tokens: what lies still in both, as a watermark does, mostly cancels."""
    return [after - before for before, after in zip(one.blocks, other.blocks, strict=True)]


class Discriminator(nn.Module):
    """One training step runs the frozen network three times, on generated, real and interpolated images.

    `extract` gives the features of images, `generator_logits` the student's loss, and a call the discriminator's own,
    of which gradients reach the heads only; `heads.update_spectral_norm()` follows each step of the optimiser.

    The networks for images and text are frozen; the heads are trained, the only weights that need saving.
    `change_heads`, if there are some, judge how the tokens of a video's frames change; beyond the paper.
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
        change_heads: DiscriminatorHeads | None = None,
    ):
        super().__init__()
        self.augmentation, self.crop, self.min_crop_area = tuple(augmentation), crop, min_crop_area
        self.features, self.heads, self.text = features, heads, text
        self.change_heads = change_heads

    @property
    def trained(self) -> dict[str, DiscriminatorHeads]:
        """The heads by their names."""
        return {"heads": self.heads} | ({} if self.change_heads is None else {"change_heads": self.change_heads})

    def update_spectral_norm(self) -> None:
        """Move the heads' spectral norms on; to be called once after each step of the optimiser."""
        for heads in self.trained.values():
            heads.update_spectral_norm()

    @classmethod
    def with_fresh_heads(
        cls,
        features: PatchFeatures,
        text: TextFeatures,
        generator: torch.Generator | None = None,
        judges_changes: bool = False,
        **options: Any,
    ) -> "Discriminator":
        """Frozen networks with float32 heads that are drawn from `generator`; `options` are the constructor's.

        Heads for changes, if asked for, are drawn after the others, which are the same without them.
        """
        sizes = len(features.blocks), features.feature_dim, text.text_dim
        heads = DiscriminatorHeads(*sizes, generator=generator)
        changes = DiscriminatorHeads(*sizes, generator=generator) if judges_changes else None
        return cls(features, heads, text, change_heads=changes, **options)

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
        return _with_constants(self.heads, fake.blocks, text)

    def generator_change_logits(self, changes: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """The same for what `change` says of two frames of a generated video; it takes `change_heads`."""
        if self.change_heads is None:
            raise ValueError("This discriminator has no heads for changes; make it with judges_changes=True.")
        return _with_constants(self.change_heads, changes, text)

    def forward(
        self,
        fake: ImageFeatures,
        fake_text: torch.Tensor,
        real: ImageFeatures,
        real_text: torch.Tensor,
        weights: torch.Tensor | None = None,
        changes: Changes | None = None,
    ) -> DiscriminatorOutput:
        """All of the discriminator's own step in one call, as a data-parallel wrapper wants it.

        Generated images are as `generator_logits` saw them; texts are `(N, D)`, and `weights` `(N,)` the interpolation
        draws for the gradient penalty, which is left out without them. That of changes, whose features are
        interpolated themselves, adds to it.
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
        logits = self.heads(fake.blocks, fake_text), self.heads(real.blocks, real_text)
        if changes is None or self.change_heads is None:
            return DiscriminatorOutput(*logits, penalty)
        fakes, reals = ([tokens.detach() for tokens in blocks] for blocks in (changes.fake, changes.real))
        if weights is not None and penalty is not None:
            between = [interpolate(one, other, weights) for one, other in zip(reals, fakes)]
            penalty = penalty + gradient_penalty(self.change_heads, between, changes.text)
        of_changes = (self.change_heads(blocks, changes.text) for blocks in (fakes, reals))
        return DiscriminatorOutput(*logits, penalty, *of_changes)


def _with_constants(heads: DiscriminatorHeads, blocks: list[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    constants = {name: parameter.detach() for name, parameter in heads.named_parameters()}
    return torch.func.functional_call(heads, constants, (blocks, text))
