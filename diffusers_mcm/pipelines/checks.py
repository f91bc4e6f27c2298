"""What is wrong with the arguments of a call, found before anything is sampled, and with what was sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn


def shown(value: Any) -> str:
    """A value as an error message quotes it; arrays by their kind and shape."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0:
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def is_one_value(value: Any) -> bool:
    """Whether a value stands for itself and not for several; text does, as do tensors and arrays of no dimension."""
    return isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0


# --- numbers ---------------------------------------------------------------------------------------------------------
def number(name: str, value: Any) -> float:
    """A finite number: Python's, NumPy's, or a tensor of no dimension."""
    found = value.item() if _is_scalar(value) else value
    if not isinstance(found, Real) or isinstance(found, bool) or not math.isfinite(found):
        raise ValueError(f"`{name}` must be a finite number, got {shown(value)}.")
    return float(found)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, at least `least` if that is given: Python's, NumPy's, or a tensor of no dimension."""
    found = value.item() if _is_scalar(value) else value
    if not isinstance(found, Integral) or isinstance(found, bool) or (least is not None and found < least):
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(f"`{name}` must be a whole number{at_least}, got {shown(value)}.")
    return int(found)


def only_dtype(*given: Any) -> torch.dtype:
    """The first type that is given, which must be a floating-point one; float32 if none is."""
    dtype = next((kind for kind in given if kind is not None), torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point type such as torch.float16, got {shown(dtype)}.")
    return dtype


def attention_options(scale: Any, cross_attention_kwargs: Any) -> tuple[float, dict[str, Any]]:
    """The strength of the LoRAs that either of the two arguments gives, and the other options of attention layers."""
    if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, Mapping):
        raise ValueError(f"`cross_attention_kwargs` must be a dictionary, got {shown(cross_attention_kwargs)}.")
    others = dict(cross_attention_kwargs or {})
    given = {"lora_scale": scale, "cross_attention_kwargs['scale']": others.pop("scale", None)}
    found = [number(name, value) for name, value in given.items() if value is not None]
    if len(set(found)) > 1:
        raise ValueError(
            f"`lora_scale` is {found[0]:g}, but `cross_attention_kwargs` says {found[1]:g}; give one of them."
        )
    return (found[0] if found else 1.0), others


def timesteps_list(timesteps: Any) -> list[float]:
    """Timesteps to visit, at least one and descending, as a list of numbers."""
    values = timesteps.tolist() if isinstance(timesteps, (torch.Tensor, np.ndarray)) else timesteps
    if is_one_value(values) or not (values := list(values)):
        raise ValueError(f"`timesteps` must be a list of at least one timestep, got {shown(timesteps)}.")
    found = [number("timesteps", value) for value in values]
    if any(later >= earlier for earlier, later in zip(found, found[1:])):
        raise ValueError(f"`timesteps` must be descending, got {shown(values)}.")
    return [int(value) if value.is_integer() else value for value in found]


# --- tensors ---------------------------------------------------------------------------------------------------------
def has_shape(value: torch.Tensor, shape: Sequence[int | str]) -> bool:
    """Whether a tensor has these sizes; one that is a word may be any but 0."""
    sizes = zip(value.shape, shape)
    return value.ndim == len(shape) and all(found == size if isinstance(size, int) else found for found, size in sizes)


def written(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def check_numbers(name: str, value: Any, shape: str) -> None:
    """Check a tensor for finite floating-point numbers; `shape` is what the error says it should be."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ValueError(f"`{name}` must be a tensor {shape} of floating-point numbers, got {shown(value)}.")
    if not all_finite(value):
        raise ValueError(f"`{name}` holds {count_of_not_finite(value)}; every value must be finite.")


def check_tensor(name: str, value: Any, shape: Sequence[int | str]) -> None:
    """Check a tensor for finite numbers and this shape, in which a word stands for any size."""
    check_numbers(name, value, written(shape))
    if not has_shape(value, shape):
        raise ValueError(f"`{name}` must have the shape {written(shape)}, got {tuple(value.shape)}.")


def generators(generator: Any, videos: int, device: torch.device) -> torch.Generator | list[torch.Generator] | None:
    """One generator for all videos, or a list of one for each, on the CPU or the pipeline's kind of device."""
    if generator is None:
        return None
    several = isinstance(generator, (list, tuple))
    each = list(generator) if several else [generator]
    wrong = [value for value in each if not isinstance(value, torch.Generator)]
    if wrong:
        raise ValueError(
            f"`generator` must be a torch.Generator or a list of one for each video, got {shown(wrong[0])};"
            " torch.Generator().manual_seed(42) makes one of the seed 42."
        )
    if several and len(each) != videos:
        raise ValueError(f"{len(each)} generators were given for {videos} videos; give one, or one for each.")
    elsewhere = [value.device for value in each if value.device.type not in ("cpu", device.type)]
    if elsewhere:
        raise ValueError(f"`generator` is on {elsewhere[0]}, the pipeline on {device}; it may also be on the cpu.")
    return each if several else generator


# --- texts -----------------------------------------------------------------------------------------------------------
def check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, features: int | None) -> None:
    """Check texts alone and together; encoded ones have so many `features`, or any number if it is `None`."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Give either `prompt` or `prompt_embeds`, and not both.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Give either `negative_prompt` or `negative_prompt_embeds`, not both.")
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        is_list = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(p, str) for p in value)
        if value is not None and not isinstance(value, str) and not is_list:
            raise ValueError(f"`{name}` must be a string or a list of at least one string, got {shown(value)}.")
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None:
            check_tensor(name, embeds, ("batch", "length", features or "features"))


def check_names(name: str, given: Any, valid: Sequence[str]) -> list[str]:
    """Check the names of the tensors that a callback asks for."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"`{name}` must be a list of names, got {shown(given)}.")
    unknown = [each for each in given if each not in valid]
    if unknown:
        raise ValueError(f"The callback cannot get {unknown[0]!r}; valid are {', '.join(valid)}.")
    return list(given)


# --- what was sampled ------------------------------------------------------------------------------------------------
def all_finite(values: torch.Tensor) -> bool:
    # The sum takes a tenth of the time of looking at each.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite()) or bool(values.isfinite().all())  # a sum may overflow where no value does


def count_of_not_finite(values: torch.Tensor) -> str:
    return f"{int((~values.isfinite()).sum())} values of {values.numel()} that are NaN or infinite"


class NotFiniteError(ValueError):
    """Values that were sampled are NaN or infinite; `found` says which and how many, without advice."""

    def __init__(self, message: str, found: str):
        super().__init__(message)
        self.found = found


def check_sampled(latents: torch.Tensor, denoiser: nn.Module) -> None:
    """Check that the denoiser's latents are finite; the error says what usually makes them otherwise."""
    _check_finite(
        latents,
        ("sampled latents", ""),
        ". The usual causes: a LoRA that is far too strong (`lora_scale`, or the weights of `set_adapters`), weights"
        " that are broken, a callback that returned such values, or a network that overflows its type"
        f" ({_type_of(denoiser)}): where that is float16, load the pipeline with dtype=torch.bfloat16 or"
        " torch.float32.",
    )


def check_decoded(frames: torch.Tensor, vae: nn.Module) -> None:
    """Check that what the VAE decoded from finite latents is finite."""
    _check_finite(
        frames,
        ("decoded frames", " (not the latents)"),
        f", though the latents are finite: the VAE overflows its type ({_type_of(vae)}), or the latents are far too"
        " large. In float16 `pipe.vae.to(torch.float32)` helps, or loading the pipeline with dtype=torch.bfloat16;"
        " otherwise a weaker LoRA (`lora_scale`).",
    )


def _check_finite(values: torch.Tensor, what: tuple[str, str], advice: str) -> None:
    if not all_finite(values):
        count = count_of_not_finite(values)
        raise NotFiniteError(f"The {what[0]} hold {count}{advice}", f"the {what[0]}{what[1]} hold {count}")


def _type_of(network: nn.Module) -> str:
    return str(network.dtype).removeprefix("torch.")
