"""What a denoiser is conditioned on, apart from the timestep."""

from __future__ import annotations

import torch

# Tensors whose first dimension is the batch, by name. `prompt_embeds` is always there.
Conditioning = dict[str, torch.Tensor]


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both in one batch; `ValueError` unless they have the same keys and shapes."""
    shapes = [{key: tuple(value.shape) for key, value in each.items()} for each in (second, first)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The negative text must have the keys and shapes of the text, {shapes[0]}, since both go through the"
            f" network in one call; got {shapes[1]}."
        )
    return {key: torch.cat([first[key], second[key]]) for key in first}


def select(conditioning: Conditioning, rows: torch.Tensor) -> Conditioning:
    """The rows of these indices, int64 `(n,)`, of every tensor."""
    return {key: value[rows.to(value.device)] for key, value in conditioning.items()}
