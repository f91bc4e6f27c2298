"""A LoRA from a folder, a file, a packaged model or the Hub."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import hub
from .adapter import (
    CONFIG_NAME,
    HEADER_KEYS,
    MOTION_HEAD_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    LoRA,
    split_key,
)
from .layouts import PEFT_PREFIX, check_no_dora, denoiser_key, recorded_config, set_scale

logger = logging.getLogger(__name__)


def read_lora(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    **hub_options,
) -> LoRA:
    """Read a LoRA from a folder, a `.safetensors` file, a packaged model or a Hub repository."""
    where = dict(subfolder=subfolder, revision=revision, **hub_options)
    source, path, where = locate_lora(source, weight_name=weight_name, **where)
    return lora_of_file(*read_tensors(path), path, source, **where)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file by their keys, and its header."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def lora_of_file(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], path: Path, source: str, **where
) -> LoRA:
    """The LoRA that a file in diffusers' or PEFT's layout holds for the denoiser, with the settings beside it."""
    lora = LoRA(tensors=_by_module(tensors, path), source=str(path), **read_settings(source, header, **where))
    is_peft = any(key.startswith(PEFT_PREFIX) for key in tensors)
    config = recorded_config(header, lora.adapter_config if is_peft else None)
    if is_peft and not config:
        logger.warning(
            "There is no %s beside %s; the LoRA's alpha is taken to be its rank.", PEFT_CONFIG_NAME, lora.source
        )
    check_no_dora(lora.source, config=lora.adapter_config)
    set_scale(lora, config)
    lora.folder = path.parent if os.path.isdir(source) else None
    return lora


def locate_lora(
    source: str | os.PathLike, *, weight_name: str | None = None, **where
) -> tuple[str, Path, dict[str, Any]]:
    """The folder or repository, the file of the weights in it, and where else to look for what is beside them."""
    source = hub.resolve(source)
    if os.path.isfile(source):
        source, weight_name = os.path.dirname(source) or ".", os.path.basename(source)
        where["subfolder"] = None
    path = find_lora_file(source, weight_name=weight_name, **where)
    if path is None:
        wanted = weight_name or f"{WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME}"
        place = f"{source} (subfolder {where['subfolder']!r})" if where.get("subfolder") else source
        raise FileNotFoundError(f"No LoRA in {place}: there is no {wanted}.{elsewhere(source, **where)}")
    return source, path, where


def find_lora_file(source: str, *, weight_name: str | None = None, **where) -> Path | None:
    """The file of a LoRA in a folder or repository: the one named, or of a usual name, or the only one that is there.

    `None` if there is none; `ValueError` where several could be meant.
    """
    if weight_name and hub.is_pickled(weight_name):
        found = Path(source, where.get("subfolder") or "", weight_name)
        advice = hub.how_to_convert(found if found.is_file() else weight_name)
        raise ValueError(f"{weight_name} of {source} is not a .safetensors file; {advice}")
    for name in (weight_name,) if weight_name else (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
        path = hub.find_file(source, name, **where)
        if path is not None:
            return path
    return None if weight_name else _the_only_one(source, **where)


def _the_only_one(source: str, **where) -> Path | None:
    """Style LoRAs have names of their own. In the folder of a whole pipeline no file is taken for a LoRA."""
    files = hub.list_files(source, **where)
    folder = Path(where.get("subfolder") or ".")
    here = [Path(name).name for name in files if Path(name).parent == folder]
    names = [name for name in here if hub.is_safetensors(name) and name != MOTION_HEAD_NAME and name[0] != "."]
    if "model_index.json" in here or not names:
        return None
    if len(names) > 1:
        place = f"{source} (subfolder {where['subfolder']!r})" if where.get("subfolder") else source
        raise ValueError(
            f"There are several files in {place}: {', '.join(names)}; name one with `weight_name` (--weight_name)."
        )
    return hub.find_file(source, names[0], **where)


def read_settings(source: str, header: Mapping[str, str], *, subfolder: str | None = None, **where) -> dict[str, Any]:
    """`config`, `scheduler_config` and `adapter_config` of a LoRA: from files beside the weights, else its header."""
    inside = f"{subfolder}/scheduler" if subfolder else "scheduler"
    files = {
        "config": (CONFIG_NAME, subfolder),
        "scheduler_config": ("scheduler_config.json", inside),
        "adapter_config": (PEFT_CONFIG_NAME, subfolder),
    }
    settings = {attribute: json.loads(header[key]) for key, attribute in HEADER_KEYS.items() if key in header}
    for attribute, (name, folder) in files.items():
        settings[attribute] = hub.read_json(source, name, subfolder=folder, **where) or settings.get(attribute)
    settings["config"] = settings["config"] or {}
    return settings


def elsewhere(source: str, **where) -> str:
    """A sentence on pickled files that are there instead, or on the subfolders that hold a LoRA; empty if none."""
    files = [Path(name) for name in hub.list_files(source, **where)]
    pickled = [path for path in files if hub.is_pickled(path) and path.parent == Path(where.get("subfolder") or ".")]
    if pickled:
        found = Path(source, pickled[0])
        return f" There is {found.name}, but {hub.how_to_convert(found if found.is_file() else found.name)}"
    folders = sorted({p.parent.as_posix() for p in files if p.name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME)} - {"."})
    return f" There are LoRAs in its subfolders: {', '.join(folders)}; name one as `subfolder`." if folders else ""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """safetensors' own handle of a file; `ValueError` if it is none, or not whole."""
    from safetensors import SafetensorError, safe_open

    if hub.is_pickled(path):
        raise ValueError(f"{path} is not a .safetensors file; {hub.how_to_convert(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}). Was the download cut short? Fetch it again."
        ) from error


def _by_module(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors by `module.lora_A.weight` and B; `ValueError` if there are others."""
    check_no_dora(str(path), tensors)
    found = {denoiser_key(key): tensor for key, tensor in tensors.items()}
    strange = [key for key in found if split_key(key)[1] not in ("lora_A.weight", "lora_B.weight")]
    if strange or not found:
        raise ValueError(
            f"{path} is not a LoRA in diffusers' (unet.*) or PEFT's (base_model.model.*) layout:"
            f" {len(strange)} of its {len(found)} keys are not lora_A/lora_B weights"
            + (f", such as {strange[0]!r}." if strange else ".")
        )
    return found
