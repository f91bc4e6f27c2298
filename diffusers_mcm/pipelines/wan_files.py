"""A whole transformer of Wan in one file, under the names of its authors, as few-step models such as rCM come."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from ..base_models import infer_base_model
from ..location import HUB_OPTIONS, Location
from ..lora import open_safetensors
from ..lora.wan_names import TABLES, wan_module

_PREFIX = re.compile(r"(?:model\.diffusion_model|diffusion_model|model|net)\.")
_A_PROJECTION = "blocks.0.self_attn.q.weight"  # by which such a file is known, and its size
PATCHES = "patch_embedding.weight"


def wan_index(path: str | os.PathLike) -> dict[str, Any] | None:
    """`model_index.json` of a pipeline with the transformer in this file; `None` if there is none of Wan in it."""
    with open_safetensors(Path(path)) as file:
        shapes = {_own(key): file.get_slice(key).get_shape() for key in file.keys()}
    if _A_PROJECTION not in shapes:
        return None
    model = infer_base_model(lora_modules={"blocks.0.attn1.to_q": shapes[_A_PROJECTION]})
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    return index | {"expand_timesteps": getattr(model, "expand_timesteps", False)}


def wan_repository(path: str | os.PathLike) -> str:
    """The repository of a Wan of the size of the transformer in a file, for all that is not in it."""
    with open_safetensors(Path(path)) as file:
        width = next(file.get_slice(key).get_shape() for key in file.keys() if _own(key) == _A_PROJECTION)
    shapes = {"blocks.0.attn1.to_q": width}
    model = infer_base_model(lora_modules=shapes)
    return model.repository_for(shapes) or model.default_repository


def load_wan_transformer(
    path: str | os.PathLike, config: str | os.PathLike, dtype: torch.dtype, **options: Any
) -> WanTransformer3DModel:
    """The transformer in a file, as `config` says, the folder or repository of a Wan of its size.

    The parts that diffusers keeps in float32 are so where `dtype` is a half type. `ValueError` unless every parameter
    is there, in its shape, and nothing else but single numbers, as trainers count their steps by.
    """
    place = Location.of(config, **{name: options[name] for name in HUB_OPTIONS if name in options})
    content = place.inside("transformer").json("config.json")
    if content is None:
        raise ValueError(f"{place} has no transformer/config.json, which the transformer in {path} is made by.")
    with init_empty_weights(include_buffers=False):  # the rotary tables are in no file
        transformer = WanTransformer3DModel.from_config(content)
    expected = dict(transformer.named_parameters())
    with open_safetensors(Path(path)) as file:
        state = _by_parameter({key: file.get_tensor(key) for key in file.keys()}, path)
    if PATCHES in state and state[PATCHES].ndim == 2:  # a matrix on flattened patches is this convolution
        weight = expected[PATCHES]
        if state[PATCHES].shape == (len(weight), math.prod(weight.shape[1:])):
            state[PATCHES] = state[PATCHES].reshape(weight.shape)
    _check_whole(state, expected, path, place)
    exact = WanTransformer3DModel._keep_in_fp32_modules or []
    for name, tensor in state.items():
        kept = dtype.itemsize < 4 and any(part in name.split(".") for part in exact)
        state[name] = tensor.to(torch.float32 if kept else dtype)
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()


def _own(key: str) -> str:
    """A key without the prefix that tools put before the transformer's."""
    found = _PREFIX.match(key)
    return key[found.end() :] if found else key


def _by_parameter(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors by diffusers' names; `ValueError` for one that has none, unless it is a single number."""
    found, strange = {}, []
    for key, tensor in tensors.items():
        module, _, kind = _own(key).rpartition(".")
        name = wan_module(_own(key)) if kind == "modulation" else wan_module(module) and f"{wan_module(module)}.{kind}"
        if name is not None and (kind in ("weight", "bias") or name.endswith(TABLES)):
            found[name] = tensor
        elif tensor.numel() != 1:
            strange.append(key)
    if strange:
        raise ValueError(
            f"{path} is no transformer of a Wan for text to video: {len(strange)} of its {len(tensors)} tensors are"
            f" none of its, such as {strange[0]!r}. Is it one of another model, or quantised?"
        )
    return found


def _check_whole(state: Mapping[str, torch.Tensor], expected: Mapping[str, Any], path: Any, place: Location) -> None:
    missing, more = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or more:
        what = f"lacks {len(missing)}, such as {missing[0]!r}" if missing else f"has {len(more)} more, as {more[0]!r}"
        raise ValueError(
            f"{path} is not the transformer of a Wan as {place} has it: of {len(expected)} parameters it {what}."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} is not the transformer of a Wan of the size of {place}: {name} has shape"
                f" {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}. `config=` names another."
            )
