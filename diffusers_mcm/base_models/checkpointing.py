"""Layers that are computed again in the backward pass, so that the forward pass keeps no more than what they read.

What it costs in memory is their inputs, and one layer at a time with all that is in it. Whole blocks of a UNet would
be too much to compute again at once: the largest of AnimateDiff holds 13 GiB at 512×512×16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: Iterable[nn.Module]) -> None:
    """Make each of these layers one that is computed again; in passes without gradients they are as they were."""
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def recompute_causal(layers: Iterable[nn.Module]) -> None:
    """`recompute` for layers of a video autoencoder, which read what earlier frames left and leave something in turn.

    They are called as `layer(x, feat_cache=…, feat_idx=…)`, as diffusers does it in `AutoencoderKLWan`. What they
    leave is detached: the next frames take it for given.
    """
    for layer in layers:
        layer.forward = partial(_recomputed_causal, layer.forward)


def _recomputed_causal(
    forward: Callable[..., Any], x: torch.Tensor, feat_cache: list | None = None, feat_idx: list[int] | None = None
) -> torch.Tensor:
    if feat_cache is None or feat_idx is None:
        return _recomputed(forward, x)
    if not torch.is_grad_enabled():
        return forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
    start, found = feat_idx[0], list(feat_cache)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, list, int]:
        # Both lists are written to, and the second time is to find what the first one found.
        left, place = list(found), [start]
        return forward(x, feat_cache=left, feat_idx=place), left, place[0]

    output, left, end = checkpoint(call, x, use_reentrant=False)
    feat_cache[start:end] = [each.detach() if isinstance(each, torch.Tensor) else each for each in left[start:end]]
    feat_idx[0] = end
    del found[end:]  # what other layers left is kept by nobody longer than without this
    found[:start] = [None] * start
    return output


def layers_of(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers that blocks of a UNet or an autoencoder of diffusers hold in lists: residual, attention, sampling."""
    for block in blocks:
        lists = [child for child in block.children() if isinstance(child, nn.ModuleList)]
        yield from (layer for children in lists for layer in children if layer is not None)
