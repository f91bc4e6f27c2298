"""The two ends of a half-precision UNet in float32.

Where nearly all of x_t is noise, x̂_0 is what little is left of x_t when the noise is taken away: (x_t − σ ε̂) / α, with
α = 0.068 at the last timestep of Stable Diffusion's schedule. A bfloat16 that the network reads or writes there, wrong
by up to 0.4 %, costs x̂_0 tens of times the c = 0.001 of the distance that training minimises. So the network is given
float32 latents and gives float32 ones, and its first convolution, last normalisation and last convolution compute in
float32 from the half-precision weights they have. Everything between stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..lora import base_layer

_LOCK = threading.Lock()


class _End(nn.Module):
    """A layer that computes in float32 while `float32_calls` is above 0, and else as its stock class does.

    No parameters of its own: the layers of a loaded network become such ones, and what is saved of it stays the same.
    """

    float32_calls = 0  # how many calls of the network want it now, from any thread

    def _widened(self, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [each if each is None else each.to(torch.promote_types(each.dtype, torch.float32)) for each in tensors]


class InputConv2d(_End, nn.Conv2d):
    """The first convolution: it reads float32 and hands on the type of its weights."""

    def _conv_forward(self, x, weight, bias):
        if not self.float32_calls:
            return super()._conv_forward(x, weight, bias)
        with _no_autocast(x):
            return super()._conv_forward(*self._widened(x, weight, bias)).to(weight.dtype)


class OutputGroupNorm(_End, nn.GroupNorm):
    """The last normalisation, with a float32 output."""

    def forward(self, x):
        if not self.float32_calls:
            return super().forward(x)
        x, weight, bias = self._widened(x, self.weight, self.bias)
        with _no_autocast(x):
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class OutputConv2d(_End, nn.Conv2d):
    """The last convolution, with a float32 output."""

    def _conv_forward(self, x, weight, bias):
        if not self.float32_calls:
            return super()._conv_forward(x, weight, bias)
        with _no_autocast(x):
            return super()._conv_forward(*self._widened(x, weight, bias))


def _no_autocast(x: torch.Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


_ENDS = {"conv_in": (nn.Conv2d, InputConv2d), "conv_norm_out": (nn.GroupNorm, OutputGroupNorm)}
_ENDS["conv_out"] = (nn.Conv2d, OutputConv2d)


def find_ends(denoiser: nn.Module) -> list[nn.Module]:
    """The layers of a UNet that can compute in float32; they are made such ones where they are not yet.

    Done once before anything else wraps their `forward` (an offload does), and again by each call, for a UNet that
    was put in a pipeline later.
    """
    found = []
    for name, (stock, exact) in _ENDS.items():
        layer = base_layer(getattr(denoiser, name, None))
        if type(layer) is stock:
            layer.__class__ = exact
        if type(layer) is exact:
            found.append(layer)
    return found


@contextmanager
def float32_ends(denoiser: nn.Module) -> Iterator[None]:
    """Calls of the UNet inside read float32 latents and give a float32 output. In float32 this changes no bit."""
    ends = find_ends(denoiser)
    with _LOCK:
        for layer in ends:
            layer.float32_calls += 1
    try:
        yield
    finally:
        with _LOCK:
            for layer in ends:
                layer.float32_calls -= 1
