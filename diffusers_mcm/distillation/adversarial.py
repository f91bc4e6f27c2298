"""The adversarial part of a training step (eq. 4 and 5)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .discriminator.model import Changes, Discriminator, ImageFeatures, change
from .draws import AdversarialDraws
from .losses import get_discriminator_loss
from .method import MethodConfig


class GeneratorLoss(NamedTuple):
    """The generated images as the discriminator saw them, and the generator's adversarial loss.

    `changes`, of the patch tokens from the images to their neighbours, and `change_loss` are None without pairs.
    """

    loss: torch.Tensor
    features: ImageFeatures
    change_loss: torch.Tensor | None = None
    changes: list[torch.Tensor] | None = None


class RealPairs(NamedTuple):
    """Frames of the videos and frames beside them, (B * l, 3, H, W) in [-1, 1] each, and their text, (B * l, D)."""

    images: torch.Tensor
    neighbours: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True)
class AdversarialStep:
    """The discriminator in one step: it sees the images of one batch twice, and takes their features once."""

    discriminator: Discriminator
    config: MethodConfig
    draws: AdversarialDraws
    text: torch.Tensor  # (B * l, D), of the text beside each generated image
    real: torch.Tensor  # (B * l, 3, H, W) real images in [-1, 1]
    real_text: torch.Tensor  # (B * l, D), of the text beside each of them
    pairs: RealPairs | None = None  # only where changes are judged

    def generator_loss(self, images: torch.Tensor, neighbours: torch.Tensor | None = None) -> GeneratorLoss:
        """Adversarial loss of generated images (B * l, 3, H, W); gradients reach them and nothing else (eq. 4).

        With `neighbours`, generated frames beside them, also that of the change to those, which is beyond the paper.
        """
        features = self.discriminator.extract(images, self.draws.fake)
        logits = self.discriminator.generator_logits(features, self.text)
        loss = get_discriminator_loss(self.config.discriminator_loss).generator
        if neighbours is None or self.pairs is None:
            return GeneratorLoss(loss(logits), features)
        changes = change(features, self.discriminator.extract(neighbours, self.draws.fake))
        of_changes = self.discriminator.generator_change_logits(changes, self.pairs.text)
        return GeneratorLoss(loss(logits), features, loss(of_changes), changes)

    def discriminator_loss(
        self, discriminator: nn.Module, generator: GeneratorLoss
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(hinge, gradient penalty, hinge of changes); gradients reach the heads and nothing else (eq. 5)."""
        with torch.no_grad():
            real = self.discriminator.extract(self.real, self.draws.real)
            changes = self._changes(generator)
        weights = self.draws.interpolation if self.config.gradient_penalty_weight else None
        output = discriminator(generator.features, self.text, real, self.real_text, weights, changes)
        loss = get_discriminator_loss(self.config.discriminator_loss).discriminator
        frames = self.config.num_adversarial_frames
        hinge = loss(output.real_logits, output.fake_logits, frames)
        penalty = None if output.penalty is None else output.penalty.mean()
        if changes is None:
            return hinge, penalty, None
        return hinge, penalty, loss(output.real_change_logits, output.fake_change_logits, frames)

    def _changes(self, generator: GeneratorLoss) -> Changes | None:
        """What the heads for changes compare, if there are pairs."""
        if self.pairs is None or generator.changes is None:
            return None
        pair = (self.discriminator.extract(each, self.draws.real) for each in self.pairs[:2])
        return Changes(generator.changes, change(*pair), self.pairs.text)
