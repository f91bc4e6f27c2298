"""The two ends of a half-precision UNet in float32.

Where nearly all of x_t is noise, x̂_0 is what little is left of x_t when the noise is taken away: (x_t − σ ε̂) / α, with
α = 0.068 at the last timestep of Stable Diffusion's schedule. A bfloat16 that the network reads or writes there, wrong
by up to 0.4 %, costs x̂_0 tens of times the c = 0.001 of the distance that training minimises. So the network is given
float32 latents and gives float32 ones, and its first convolution, last normalisation and last convolution compute in
float32 from the half-precision weights they have, and so do LoRAs on them. Everything between stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..lora import base_layer

_LOCK = threading.Lock()
# Asked here once: `torch.compile` of torch before 2.7 cannot go through the question.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")
_WITH_AUTOCAST = frozenset(kind for kind in _DEVICES if torch.amp.is_autocast_available(kind))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _End(nn.Module):
    """A layer that computes in float32 while `float32_calls` is above 0, and else as its stock class does.

    No parameters of its own: the layers of a loaded network become such ones, and what is saved of it stays the same.
    """

    float32_calls = 0  # how many calls of the network want it now, from any thread

    def _widened(self, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [each if each is None else at_least_float32(each) for each in tensors]


class OutputConv2d(_End, nn.Conv2d):
    """The last convolution, with a float32 output."""

    def _conv_forward(self, x, weight, bias):
        return (self._convolve if self.float32_calls else super()._conv_forward)(x, weight, bias)

    def _convolve(self, x, weight, bias):
        """The convolution in float32, of whatever type x and the weights are, outside autocast."""
        # A whole network of float32 computes as torch's settings say, in its middle and at its ends.
        kind = x.device.type
        as_set = x.dtype == weight.dtype and not (kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind))
        exact_weight = weight.dtype in _EXACT_IN_TF32
        x, weight, bias = self._widened(x, weight, bias)
        with no_autocast(x.device.type):
            if as_set or not _takes_tf32(x):
                return super()._conv_forward(x, weight, bias)
            coarse, rest = _split(x)
            if exact_weight:
                return super()._conv_forward(coarse, weight, bias) + super()._conv_forward(rest, weight, None)
            coarse_weight, rest_of_weight = _split(weight)
            output = super()._conv_forward(coarse, coarse_weight, bias) + super()._conv_forward(rest, weight, None)
            return output + super()._conv_forward(coarse, rest_of_weight, None)


class InputConv2d(OutputConv2d):
    """The first convolution: it reads float32 and hands on the type of its weights."""

    def _conv_forward(self, x, weight, bias):
        output = super()._conv_forward(x, weight, bias)
        return output.to(weight.dtype) if self.float32_calls else output


class OutputGroupNorm(_End, nn.GroupNorm):
    """The last normalisation, with a float32 output."""

    def forward(self, x):
        if not self.float32_calls:
            return super().forward(x)
        x, weight, bias = self._widened(x, self.weight, self.bias)
        with no_autocast(x.device.type):
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


# --- float32 convolutions where torch makes them of TF32 -------------------------------------------------------------
_EXACT_IN_TF32 = (torch.float16, torch.bfloat16)


def _takes_tf32(x: torch.Tensor) -> bool:
    """Whether cuDNN may round what it multiplies to TF32's 11 significant bits: torch allows it by default.

    The permission belongs to the whole process. Taking it away for a moment would do so in other threads too, hence
    `_split`, which is right with it and without.
    """
    return x.device.type == "cuda" and x.dtype == torch.float32


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What TF32 keeps of x, and the rest of it, of which TF32 then loses less than x 2⁻²². Gradients take the rest."""
    bits = x.detach().view(torch.int32)
    coarse = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)  # the 13 last bits rounded away
    return coarse, x - coarse


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context in which what runs on this type of device is computed in the types that it has."""
    return torch.autocast(kind, enabled=False) if kind in _WITH_AUTOCAST else nullcontext()


# --- making them -----------------------------------------------------------------------------------------------------
_ENDS = {"conv_in": (nn.Conv2d, InputConv2d), "conv_norm_out": (nn.GroupNorm, OutputGroupNorm)}
_ENDS["conv_out"] = (nn.Conv2d, OutputConv2d)
_ROUNDING = "cast_input_dtype_enabled"  # PEFT's name for it


def find_ends(denoiser: nn.Module) -> list[nn.Module]:
    """The layers of a UNet that can compute in float32; they are made such ones where they are not yet.

    Done when a pipeline is made, and again by each call, for a UNet that was put in it later.
    """
    found = []
    for name, (stock, exact) in _ENDS.items():
        layer = getattr(denoiser, name, None)
        of_loras = [each for half in _lora_convolutions(layer) for each in getattr(layer, half).values()]
        for module, kind in [(base_layer(layer), exact), *((each, OutputConv2d) for each in of_loras)]:
            # PEFT makes a LoRA's convolutions of the class of the one that they are added to.
            if type(module) in (stock, exact) and type(module) is not kind and _takes_class(module, kind):
                module.__class__ = kind
            if type(module) is kind:
                found.append(module)
    return found


def _lora_convolutions(layer: nn.Module | None) -> tuple[str, ...]:
    """Where PEFT keeps the two convolutions of each LoRA. A variant, such as DoRA, stays in half precision."""
    return () if getattr(layer, "lora_variant", None) or not hasattr(layer, "lora_A") else ("lora_A", "lora_B")


def _takes_class(layer: nn.Module, exact: type[nn.Module]) -> bool:
    """Whether the layer computes as another class does once it is of that class.

    A hook may hold the `forward` that it was put around, of the stock class. In those of accelerate and diffusers it
    is replaced here; False for any other.
    """
    if "forward" not in vars(layer) or exact.forward is type(layer).forward:  # which asks the class again
        return True
    holders = [layer, *getattr(getattr(layer, "_diffusers_hook", None), "_fn_refs", ())]
    names = ("_old_forward", "forward", "original_forward")
    places = [(holder, name) for holder in holders for name in names]
    held = [at for at in places if getattr(vars(at[0]).get(at[1]), "__func__", None) is type(layer).forward]
    for holder, name in held:
        setattr(holder, name, MethodType(exact.forward, layer))
    return bool(held)


@contextmanager
def float32_ends(denoiser: nn.Module) -> Iterator[None]:
    """Calls of the UNet inside read float32 latents and give a float32 output. In float32 this changes no bit."""
    ends = find_ends(denoiser)
    norm: Any = getattr(denoiser, "conv_norm_out", None)
    if type(norm) is nn.GroupNorm and norm.weight is not None and norm.weight.dtype in _EXACT_IN_TF32:
        raise ValueError(  # or it would silently stay in half precision
            "Expected `conv_norm_out` of the denoiser with its own `forward`, or within hooks of accelerate or"
            f" diffusers; got {norm.forward!r}, which keeps it from computing in float32. Put that around it after the"
            " pipeline is made (or after `denoise` was called once), or give the denoiser in float32."
        )
    # PEFT rounds what a LoRA reads to the type of its weights, but not inside this.
    layers: list[Any] = [getattr(denoiser, name, None) for name in _ENDS]
    rounding = [each for each in layers if _lora_convolutions(each) and getattr(each, _ROUNDING, False)]
    with _LOCK:
        for layer in ends:
            layer.float32_calls += 1
    for layer in rounding:
        setattr(layer, _ROUNDING, False)
    try:
        yield
    finally:
        for layer in rounding:
            setattr(layer, _ROUNDING, True)
        with _LOCK:
            for layer in ends:
                layer.float32_calls -= 1
