"""The adversarial part of a training step (eq. 4 and 5)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .discriminator.model import Discriminator, ImageFeatures
from .draws import AdversarialDraws
from .losses import get_discriminator_loss
from .method import MethodConfig


class GeneratorLoss(NamedTuple):
    """The generated images as the discriminator saw them, and the generator's adversarial loss."""

    loss: torch.Tensor
    features: ImageFeatures


@dataclass(frozen=True)
class AdversarialStep:
    """The discriminator in one step: it sees the images of one batch twice, and takes their features once."""

    discriminator: Discriminator
    config: MethodConfig
    draws: AdversarialDraws
    text: torch.Tensor  # (B * l, D), of the text beside each generated image
    real: torch.Tensor  # (B * l, 3, H, W) real images in [-1, 1]
    real_text: torch.Tensor  # (B * l, D), of the text beside each of them

    def generator_loss(self, images: torch.Tensor) -> GeneratorLoss:
        """Adversarial loss of generated images (B * l, 3, H, W); gradients reach them and nothing else (eq. 4)."""
        features = self.discriminator.extract(images, self.draws.fake)
        logits = self.discriminator.generator_logits(features, self.text)
        return GeneratorLoss(get_discriminator_loss(self.config.discriminator_loss).generator(logits), features)

    def discriminator_loss(
        self, discriminator: nn.Module, fake: ImageFeatures
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hinge, gradient penalty); gradients reach the heads and nothing else (eq. 5)."""
        with torch.no_grad():
            real = self.discriminator.extract(self.real, self.draws.real)
        weights = self.draws.interpolation if self.config.gradient_penalty_weight else None
        output = discriminator(fake, self.text, real, self.real_text, weights)
        loss = get_discriminator_loss(self.config.discriminator_loss).discriminator
        hinge = loss(output.real_logits, output.fake_logits, self.config.num_adversarial_frames)
        return hinge, None if output.penalty is None else output.penalty.mean()
