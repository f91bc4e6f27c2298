"""A LoRA as a file, or as the folder that `MCMPipeline.from_pretrained` reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_file, atomic_files, write_text
from ..location import WEIGHTS_NAME
from .adapter import HEADER_KEYS, METADATA_KEY, SCHEDULER_NAME, LoRA

_PEFT_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def write_lora_weights(path: str | Path, loras: Mapping[str, LoRA]) -> None:
    """Write a safetensors file with a LoRA for each component, such as `{"unet": lora}`.

    In it are `unet.*` keys, the metadata that diffusers' `load_lora_weights` reads, and ours.
    """
    tensors: dict[str, torch.Tensor] = {}
    header: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    for component, lora in loras.items():
        tensors |= {f"{component}.{key}": tensor.detach().cpu().contiguous() for key, tensor in lora.tensors.items()}
        own = lora_header(lora, component)
        header = own | header
        metadata |= json.loads(own[METADATA_KEY])
    write_safetensors(path, tensors, header | {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def lora_header(lora: LoRA, prefix: str) -> dict[str, str]:
    """The header of a LoRA file: scale, settings, scheduler."""
    config = lora.peft_config()
    metadata = {f"{prefix}.{key}": getattr(config, key) for key in _PEFT_KEYS}
    metadata[f"{prefix}.target_modules"] = lora.modules
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    ours = zip(HEADER_KEYS, (lora.settings.to_dict(), lora.scheduler_config, lora.adapter_config))
    return header | {key: json.dumps(value, sort_keys=True, default=str) for key, value in ours if value}


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all, for whom the umask allows, and the same bytes each time.

    `save_file` writes for its own user only, and the metadata in an order that it draws.
    """
    from safetensors.torch import save

    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length, the header (JSON), the tensors
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
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
