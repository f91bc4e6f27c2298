"""A LoRA from a folder, a file, a packaged model or the Hub."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..location import Location
from ..settings import Settings
from .adapter import HEADER_KEYS, PEFT_CONFIG_NAME, SCHEDULER_NAME, LoRA, split_key
from .layouts import PEFT_PREFIX, check_no_dora, denoiser_key, recorded_config, set_scale

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA's file, whatever its layout, and where it was found."""

    location: Location  # of the folder or repository that it lies in
    path: Path
    tensors: dict[str, torch.Tensor]
    header: dict[str, str]


def read_lora(source: str | os.PathLike | Location, **options) -> LoRA:
    """Read a LoRA from a folder, a `.safetensors` file, a packaged model or a Hub repository.

    `options` are those of `Location.of`: `subfolder`, `weight_name`, `revision`, and the Hub's.
    """
    return to_lora(read_lora_file(Location.of(source, **options)))


def read_lora_file(location: Location, *other_names: str) -> LoRAFile:
    """Read the file of a LoRA; `other_names` are those that it may have beside the usual ones."""
    path = location.lora_file(*other_names)
    with open_safetensors(path) as file:
        return LoRAFile(location, path, {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})


def to_lora(file: LoRAFile) -> LoRA:
    """The LoRA for the denoiser in a file of diffusers' or PEFT's layout, with the settings beside it."""
    lora = LoRA(tensors=_by_module(file.tensors, file.path), source=str(file.path))
    lora.settings, lora.scheduler_config, lora.adapter_config = read_beside(file.location, file.header)
    is_peft = any(key.startswith(PEFT_PREFIX) for key in file.tensors)
    config = recorded_config(file.header, lora.adapter_config if is_peft else None)
    if is_peft and not config:
        logger.warning(
            "There is no %s beside %s; the LoRA's alpha is taken to be its rank.", PEFT_CONFIG_NAME, lora.source
        )
    set_scale(lora, config)
    lora.folder = None if file.location.remote else file.path.parent
    return lora


def read_beside(
    location: Location, header: Mapping[str, str]
) -> tuple[Settings, dict[str, Any] | None, dict[str, Any] | None]:
    """Settings, and the configurations of scheduler and PEFT, from the files beside the weights or else their header."""
    place = location.around()
    config, scheduler_config, adapter_config = (json.loads(header.get(key, "null")) for key in HEADER_KEYS)
    settings = Settings.read(place) or Settings.from_dict(config or {})
    return settings, place.json(SCHEDULER_NAME) or scheduler_config, place.json(PEFT_CONFIG_NAME) or adapter_config


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
