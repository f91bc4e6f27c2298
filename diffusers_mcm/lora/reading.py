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
    METADATA_KEY,
    MOTION_HEAD_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHTS_NAME,
    PREFIXES,
    WEIGHTS_NAME,
    LoRA,
    split_key,
)

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
    with open_safetensors(path) as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    lora = LoRA(tensors=_strip_prefixes(tensors, path), source=str(path), **read_settings(source, header, **where))
    _read_alpha(lora, header, is_peft=any(key.startswith(PEFT_PREFIX) for key in tensors))
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


def _strip_prefixes(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    if any("lora_magnitude_vector" in key or key.endswith(".dora_scale") for key in tensors):
        raise ValueError(f"{path} is a DoRA; only plain LoRA is supported.")
    stripped = {_strip_prefix(key): tensor for key, tensor in tensors.items()}
    strange = [key for key in stripped if split_key(key)[1] not in ("lora_A.weight", "lora_B.weight")]
    if strange or not stripped:
        raise ValueError(
            f"{path} is not a LoRA in diffusers' (unet.*) or PEFT's (base_model.model.*) layout:"
            f" {len(strange)} of its {len(stripped)} keys are not lora_A/lora_B weights"
            + (f", such as {strange[0]!r}." if strange else ".")
        )
    return stripped


def _strip_prefix(key: str) -> str:
    return key.removeprefix(next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""))


def _read_alpha(lora: LoRA, header: Mapping[str, str], is_peft: bool) -> None:
    """The scale's numerator, from PEFT's configuration file or diffusers' metadata."""
    config = dict(lora.adapter_config or {}) if is_peft else {}
    if not config and METADATA_KEY in header:
        config = {_strip_prefix(key): value for key, value in json.loads(header[METADATA_KEY]).items()}
    if is_peft and not config:
        logger.warning(
            "There is no %s beside %s; the LoRA's alpha is taken to be its rank.", PEFT_CONFIG_NAME, lora.source
        )
    if config.get("use_dora") or (lora.adapter_config or {}).get("use_dora"):
        raise ValueError(f"{lora.source} is a DoRA; only plain LoRA is supported.")
    lora.alpha = config.get("lora_alpha")
    lora.alpha_pattern = dict(config.get("alpha_pattern") or {})
    lora.use_rslora = bool(config.get("use_rslora", False))
