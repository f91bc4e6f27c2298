"""A LoRA as a file: read from wherever it lies, and written as the folder that `MCMPipeline.from_pretrained` reads."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..files import atomic_file, atomic_files, write_text
from ..location import SCHEDULER_NAME, WEIGHTS_NAME, Location, json_object
from ..settings import LOW_NOISE, Settings
from .adapter import HEADER_KEYS, METADATA_KEY, PEFT_CONFIG_NAME, LoRA, split_key
from .layouts import (
    DENOISER,
    PEFT_PREFIX,
    SECOND_DENOISER,
    check_no_dora,
    denoiser_key,
    is_wan,
    recorded_config,
    set_scale,
)
from .sorting import sort_wan

logger = logging.getLogger(__name__)

_PEFT_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


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
    """The LoRA for the denoiser in a file of diffusers' or PEFT's layout, or for Wan in any, with the settings beside
    it. One whose keys are of a second denoiser is for the low-noise expert, and its settings say so; `ValueError` for
    a file with both."""
    return only_lora(to_loras(file), file.path)


def only_lora(loras: Mapping[str, LoRA], path: Path) -> LoRA:
    """The one LoRA of those that `to_loras` found in a file, as `to_lora` gives it."""
    if {DENOISER, SECOND_DENOISER} <= loras.keys():
        raise ValueError(
            f"{path} holds LoRAs for both experts of a Wan that has two ({SECOND_DENOISER}.*); one was expected."
            " Load it with `load_lora_weights` of a pipeline with two experts."
        )
    if SECOND_DENOISER in loras:
        lora = loras[SECOND_DENOISER]
        return replace(lora, settings=replace(lora.settings, expert=LOW_NOISE))
    return loras[DENOISER]


def to_loras(file: LoRAFile) -> dict[str, LoRA]:
    """The LoRAs in such a file by component: `DENOISER`, and `SECOND_DENOISER` where the file is for two experts."""
    settings, scheduler_config, adapter_config = read_beside(file.location, file.header)
    is_peft = any(key.startswith(PEFT_PREFIX) for key in file.tensors)
    beside = adapter_config if is_peft else None
    source = str(file.path)
    config = recorded_config(file.header, beside)
    if is_peft and not config:
        logger.warning("There is no %s beside %s; the LoRA's alpha is taken to be its rank.", PEFT_CONFIG_NAME, source)
    if is_wan(file.tensors):
        loras = sort_wan(file.tensors, file.header, source, beside)
    else:
        loras = {DENOISER: LoRA(tensors=_by_module(file.tensors, file.path), source=source)}
        set_scale(loras[DENOISER], config)
    check_no_dora(source, config=adapter_config)
    for lora in loras.values():
        lora.settings, lora.scheduler_config, lora.adapter_config = settings, scheduler_config, adapter_config
        lora.folder = None if file.location.remote else file.path.parent
    return loras


def read_beside(
    location: Location, header: Mapping[str, str]
) -> tuple[Settings, dict[str, Any] | None, dict[str, Any] | None]:
    """Settings, and the configurations of scheduler and PEFT: from files beside the weights, or else their header."""
    place = location.around()
    config, scheduler_config, adapter_config = (
        json_object(header[key], f"{key} in the header of {location}") if header.get(key, "null") != "null" else None
        for key in HEADER_KEYS
    )
    own = Settings.from_dict(config or {})
    settings = Settings.read(place) or own
    if own.expert:  # beside the two files of a pair there may be the settings of one of them
        settings = replace(settings, expert=own.expert)
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


def write_lora_weights(path: str | Path, loras: Mapping[str, LoRA]) -> None:
    """Write a safetensors file with a LoRA for each component, such as `{"unet": lora}`.

    In it are `unet.*` keys, the metadata that diffusers' `load_lora_weights` reads, and ours.
    """
    tensors: dict[str, torch.Tensor] = {}
    header: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    for component, lora in loras.items():
        parts = {**lora.tensors, **{_difference_key(name): each for name, each in lora.differences.items()}}
        tensors |= {f"{component}.{key}": tensor.detach().cpu().contiguous() for key, tensor in parts.items()}
        own = lora_header(lora, component)
        header = own | header
        metadata |= json.loads(own[METADATA_KEY])
    write_safetensors(path, tensors, header | {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def _difference_key(parameter: str) -> str:
    """`x.bias` as `x.diff_b`, `x.weight` as `x.diff`. diffusers refuses a file that has such keys, as it should."""
    for role, kind in (("diff_b", ".bias"), ("diff", ".weight")):
        if parameter.endswith(kind):
            return f"{parameter.removesuffix(kind)}.{role}"
    return f"{parameter}.diff"


def lora_header(lora: LoRA, prefix: str) -> dict[str, str]:
    """The header of a LoRA file: scale, settings, scheduler."""
    config = lora.peft_config()
    metadata = {f"{prefix}.{key}": getattr(config, key) for key in _PEFT_KEYS}
    metadata[f"{prefix}.target_modules"] = lora.modules
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    ours = zip(HEADER_KEYS, (lora.settings.to_dict(), lora.scheduler_config, lora.adapter_config))
    return header | {key: json.dumps(value, sort_keys=True, default=str) for key, value in ours if value}


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], synced: bool = False
) -> None:
    """Write a file whole or not at all, for whom the umask allows, and the same bytes each time; `synced` as in
    `atomic_file`.

    `save_file` writes for its own user only, and the metadata in an order that it draws.
    """
    from safetensors.torch import save

    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length, the header (JSON), the tensors
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, synced) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


def write_lora_folder(folder: Path, lora: LoRA, prefix: str) -> None:
    """Write weights and the settings beside them, all or nothing; other files in the folder stay."""
    with atomic_files(folder, WEIGHTS_NAME) as temporary:
        write_lora_weights(temporary / WEIGHTS_NAME, {prefix: lora})
        write_settings(temporary, lora)


def write_settings(folder: Path, lora: LoRA) -> None:
    """Write the files beside the weights, where there is any: mcm_config.json and scheduler/scheduler_config.json."""
    if lora.settings:
        lora.settings.write(folder)
    if lora.scheduler_config is not None:
        content = json.dumps(lora.scheduler_config, indent=2, sort_keys=True, default=str)
        write_text(folder / SCHEDULER_NAME, content + "\n")
