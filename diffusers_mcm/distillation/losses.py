"""The distance of consistency distillation (eq. 3) and the adversarial losses (eq. 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

TEMPORAL_LAGS = (1, 3)  # frames: from one to the next, and over a stretch in which motion shows


def pseudo_huber(a: torch.Tensor, b: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """d(a, b) = mean of √((a − b)² + c²) − c over the elements (eq. 3), float32."""
    if a.shape != b.shape:
        raise ValueError(f"The distance needs two tensors of one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if c <= 0:
        raise ValueError(f"c must be positive; got {c}.")
    difference = a.float() - b.float()
    return ((difference**2 + c**2).sqrt() - c).mean()


def temporal_distance(a: torch.Tensor, b: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """How differently two clips of latents (B, C, T, H, W) change in time, float32; beyond the paper.

    The mean over the lags k in `TEMPORAL_LAGS` below T of d(a_{f+k} − a_f, b_{f+k} − b_f), with eq. 3's distance d.
    An error that all frames share costs nothing, one that comes and goes costs up to twice what it does in d(a, b).

    Raises:
        ValueError: for clips of one frame, or of two shapes.
    """
    frames = a.shape[2]
    if frames < 2:
        raise ValueError(f"The temporal distance compares frames with later ones: expected 2 or more, got {frames}.")
    a, b = a.float(), b.float()
    changes = [(a[:, :, k:] - a[:, :, :-k], b[:, :, k:] - b[:, :, :-k]) for k in TEMPORAL_LAGS if k < frames]
    return torch.stack([pseudo_huber(one, other, c) for one, other in changes]).mean()


class DiscriminatorLoss(NamedTuple):
    """A pair of adversarial losses over patch logits (N, P), N frames of P patches each."""

    generator: Callable[[torch.Tensor], torch.Tensor]
    """`generator(fake logits)`"""
    discriminator: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    """`discriminator(real logits, fake logits, frames_per_sample)`; the frames of a sample follow one another"""


def _generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """L_adv^G = −E[D(v̂)] (eq. 4)."""
    return -fake.float().mean()


def _hinge(real: torch.Tensor, fake: torch.Tensor, frames_per_sample: int = 1) -> torch.Tensor:
    """L_adv^D (eq. 5), the hinge taken patch by patch."""
    return torch.relu(1 + fake.float()).mean() + torch.relu(1 - real.float()).mean()


def _hinge_mean(real: torch.Tensor, fake: torch.Tensor, frames_per_sample: int) -> torch.Tensor:
    """L_adv^D to the letter of eq. 5: a frame's score is one number, and the mean over frames is inside the hinge."""
    if frames_per_sample < 1 or len(fake) % frames_per_sample:
        raise ValueError(f"{len(fake)} generated frames are not a multiple of {frames_per_sample} frames per sample.")
    fake_scores = fake.float().mean(1).reshape(-1, frames_per_sample).mean(1)
    return _hinge(real.float().mean(1), fake_scores)


DISCRIMINATOR_LOSSES: dict[str, DiscriminatorLoss] = {
    "hinge": DiscriminatorLoss(_generator_loss, _hinge),
    "hinge_mean": DiscriminatorLoss(_generator_loss, _hinge_mean),
}


def get_discriminator_loss(name: str) -> DiscriminatorLoss:
    """The row of `DISCRIMINATOR_LOSSES` called `name`."""
    if name not in DISCRIMINATOR_LOSSES:
        raise ValueError(f"Unknown discriminator loss {name!r}; valid values are {sorted(DISCRIMINATOR_LOSSES)}.")
    return DISCRIMINATOR_LOSSES[name]
