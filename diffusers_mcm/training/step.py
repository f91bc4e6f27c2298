"""One training step: the student's loss (eq. 2-5, 7, 9) and the discriminator's."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..base_models import BaseModel, Text
from ..consistency import NoisePath
from ..discriminator import Discriminator, ImageFeatures
from ..lora import lora_disabled
from ..losses import get_discriminator_loss, pseudo_huber
from ..teacher import teacher_step
from ..trajectory import mixed_start, noisy_start, pick_frames
from .config import TrainingConfig
from .folding import folded
from .randomness import AdversarialDraws, StepDraws


class Judgement(NamedTuple):
    """The generated images as the discriminator saw them, and the generator's adversarial loss."""

    loss: torch.Tensor
    features: ImageFeatures


class StudentLosses(NamedTuple):
    total: torch.Tensor
    consistency: torch.Tensor
    judgement: Judgement | None = None


class Judge:
    """The discriminator's part in one step: images of one batch, judged twice with their features taken once.

    Args:
        text: (B * l, D) embeddings of the text beside each generated image.
        real: (B * l, 3, H, W) real images, in [-1, 1]; `real_text`: (B * l, D) of the text beside each.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        config: TrainingConfig,
        draws: AdversarialDraws,
        text: torch.Tensor,
        real: torch.Tensor,
        real_text: torch.Tensor,
    ):
        self.discriminator, self.config, self.draws = discriminator, config, draws
        self.text, self.real, self.real_text = text, real, real_text
        self.rule = get_discriminator_loss(config.discriminator_loss)

    def generator_loss(self, images: torch.Tensor) -> Judgement:
        """Adversarial loss of generated images (B * l, 3, H, W); gradients reach them and nothing else (eq. 4)."""
        features = self.discriminator.extract(images, self.draws.fake)
        logits = self.discriminator.generator_logits(features, self.text)
        return Judgement(self.rule.generator(logits), features)

    def discriminator_loss(
        self, discriminator: nn.Module, fake: ImageFeatures
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hinge, gradient penalty); gradients reach the heads and nothing else (eq. 5)."""
        with torch.no_grad():
            real = self.discriminator.extract(self.real, self.draws.real)
        weights = self.draws.interpolation if self.config.gradient_penalty_weight else None
        output = discriminator(fake, self.text, real, self.real_text, weights)
        frames = self.config.num_adversarial_frames
        hinge = self.rule.discriminator(output.real_logits, output.fake_logits, frames)
        return hinge, None if output.penalty is None else output.penalty.mean()


class Student(nn.Module):
    """Denoiser with LoRA and motion head, and the loss that trains both. The teacher is the same denoiser without it.

    A module, so that a data-parallel wrapper sees one forward pass per backward pass.
    """

    def __init__(
        self,
        base: BaseModel,
        denoiser: nn.Module,
        vae: nn.Module,
        path: NoisePath,
        motion: nn.Module,
        config: TrainingConfig,
    ):
        super().__init__()
        self.base, self.path, self.config = base, path, config
        self.denoiser, self.vae = denoiser, vae
        self.motion, self.target_motion = motion, copy.deepcopy(motion).requires_grad_(False)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, text: Text, network: Callable | None = None) -> torch.Tensor:
        """The output of the denoiser, or of `network`, which is called like it."""
        return self.base.denoise(network or self.denoiser, x_t, t, text)

    def consistency(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, network: Callable | None = None
    ) -> torch.Tensor:
        """f(x_t, t) (eq. 1)."""
        return self.path.consistency_function(self.denoise(x_t, t, text, network), x_t, t)

    def encode_real(self, pixels: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """x_0 (B, C, T, h, w) float32 of the clips that start a trajectory; zeros for the others, not encoded."""
        real = (draws.coin < self.config.lambda_real).nonzero().flatten().to(pixels.device)
        x_0 = torch.zeros_like(draws.noise)
        if len(real):
            latents = self.base.encode_video(self.vae, pixels[real], draws.encoder_noise[real])
            x_0.index_copy_(0, real, latents.to(x_0.dtype))
        return x_0

    def forward(
        self,
        pixels: torch.Tensor,
        text: Text,
        negative_text: Text,
        draws: StepDraws,
        judge: Judge | None = None,
    ) -> StudentLosses:
        """Motion consistency distillation (eq. 9) on clips (B, 3, T, H, W) in [-1, 1]; latents are (B, C, T, h, w)."""
        path, config, t = self.path, self.config, draws.timestep
        t_prev = path.previous_timestep(t, config.num_solver_steps)
        theta = folded(self.denoiser) if config.fold_lora else None
        f = partial(self.consistency, text=text, network=theta)
        with torch.no_grad():
            x_0 = self.encode_real(pixels, draws)
            student = partial(self.denoise, network=theta)
            x_0, _ = mixed_start(student, path, x_0, draws.start_noise, draws.coin, config.lambda_real, text)
            x_t = noisy_start(path, x_0, draws.noise, t)
            with lora_disabled(self.denoiser):  # teacher φ (eq. 2)
                x_prev = teacher_step(self.denoise, path, x_t, t, t_prev, text, negative_text, draws.guidance)
            target = f(x_prev, t_prev)  # θ⁻

        prediction = f(x_t, t)  # θ
        with torch.autocast(pixels.device.type, enabled=False):  # what c = 0.001 tells apart, half types do not
            distance = pseudo_huber(self.motion(prediction), self.target_motion(target), config.huber_c)  # eq. 3, 6
        if judge is None:
            return StudentLosses(distance, distance)
        frames = pick_frames(pixels.shape[2], draws.frames)  # (B, l)
        judgement = judge.generator_loss(self.base.decode_frames(self.vae, prediction, frames))
        return StudentLosses(distance + config.lambda_adv * judgement.loss, distance, judgement)
