"""The discriminator's gradient penalty, in the WGAN-GP form, on the features of interpolated images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GROWTH_THRESHOLD = 100.0  # a mean penalty from which on its weight grows
GROWTH_INTERVAL = 500  # steps for which a weight is kept before it may grow again


@dataclass
class PenaltyWeight:
    """The penalty's weight in the loss: once in a while, where the penalty is large, it grows for the rest of the run.

    It is multiplied by `growth` where the mean penalty is `GROWTH_THRESHOLD` or more, at most once in
    `GROWTH_INTERVAL` steps; a growth of 1 keeps it as it is.
    """

    value: float
    growth: float
    grown_at: int | None = None

    def follow(self, penalty: float, step: int) -> None:
        """After step `step`: take note of its mean penalty, over all images of all processes and micro-batches."""
        rested = self.grown_at is None or step - self.grown_at >= GROWTH_INTERVAL
        if self.growth != 1 and rested and penalty >= GROWTH_THRESHOLD:
            self.value, self.grown_at = self.value * self.growth, step

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "grown_at": self.grown_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.grown_at = state["value"], state["grown_at"]


def interpolate(real: torch.Tensor, fake: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """u · real + (1 − u) · fake with one u per sample; any shape `(N, …)`, `weights` `(N,)`."""
    if real.shape != fake.shape:
        raise ValueError(
            f"Expected real and generated tensors of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    if weights.shape != real.shape[:1]:
        raise ValueError(f"Expected interpolation weights of shape ({len(real)},), got {tuple(weights.shape)}.")
    weights = weights.to(real).reshape(-1, *[1] * (real.ndim - 1))
    return weights * real + (1 - weights) * fake


def gradient_penalty(
    heads: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor],
    features: Sequence[torch.Tensor],
    text: torch.Tensor,
) -> torch.Tensor:
    """(‖∇ Σ logits‖₂ − 1)² per image, `(N,)` float32; the gradient is over the features of all blocks together.

    Features, `(N, P, C)` per block, enter as constants: the second derivative goes through the heads only. Always in
    float32, for a gradient of a gradient does not survive half precision.
    """
    features = [tokens.detach().float().requires_grad_() for tokens in features]
    with torch.autocast(text.device.type, enabled=False):
        logits = heads(features, text.detach().float())
        gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
        norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    return (norms - 1) ** 2
