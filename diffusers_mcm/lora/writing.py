"""A LoRA as a file, or as the folder that `MCMPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import atomic_file, atomic_files, write_text
from ..location import WEIGHTS_NAME
from ..settings import SamplingDefaults, Settings
from .adapter import DEFAULT_ADAPTER, HEADER_KEYS, METADATA_KEY, SCHEDULER_NAME, LoRA
from .layers import extract_lora


def write_lora_weights(path: str | Path, lora: LoRA, prefix: str = "unet") -> None:
    """Write a safetensors file: `unet.*` keys, the metadata that diffusers' `load_lora_weights` reads, and ours."""
    tensors = {f"{prefix}.{key}": tensor.detach().cpu().contiguous() for key, tensor in sorted(lora.tensors.items())}
    write_safetensors(path, tensors, lora_header(lora, prefix))


def lora_header(lora: LoRA, prefix: str) -> dict[str, str]:
    """The header of a LoRA file: scale, settings, scheduler."""
    config = lora.peft_config()
    metadata = dict(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=lora.modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
    )
    metadata = {f"{prefix}.{key}": value for key, value in metadata.items()}
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


def save_lora(
    folder: str | os.PathLike,
    denoiser: nn.Module,
    base_model,
    *,
    repository: str | os.PathLike | None = None,
    revision: str | None = None,
    extra_repositories: Mapping[str, str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    scheduler=None,
    adapter_name: str = DEFAULT_ADAPTER,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the LoRA in a denoiser as the folder that `MCMPipeline.from_pretrained` reads.

    `base_model` is a `BaseModel`; `repository`, `revision` and `extra_repositories` say where its weights came from (a
    local folder is recorded relative to `folder`); `sampling` holds what `SamplingDefaults` does; `scheduler` is the
    one to sample with.
    """
    folder = Path(folder)
    settings = Settings(
        base_model=base_model.name,
        base_model_repository=os.fspath(repository or base_model.default_repository),
        base_model_revision=revision,
        extra_repositories=extra_repositories or {},
        sampling=SamplingDefaults.from_dict(sampling or {}),
        training=training or {},
    ).recorded_in(folder)
    lora = extract_lora(denoiser, adapter_name).cast(dtype)
    lora.settings = settings
    lora.scheduler_config = None if scheduler is None else json.loads(scheduler.to_json_string())
    write_lora_folder(folder, lora, base_model.denoiser_name)
    return folder


def write_lora_folder(folder: Path, lora: LoRA, prefix: str) -> None:
    """Write weights and the settings beside them, all or nothing; other files in the folder stay."""
    with atomic_files(folder, WEIGHTS_NAME) as temporary:
        write_lora_weights(temporary / WEIGHTS_NAME, lora, prefix)
        write_settings(temporary, lora)


def write_settings(folder: Path, lora: LoRA) -> None:
    """Write the files beside the weights, where there is any: mcm_config.json and scheduler/scheduler_config.json."""
    if lora.settings:
        lora.settings.write(folder)
    if lora.scheduler_config is not None:
        content = json.dumps(lora.scheduler_config, indent=2, sort_keys=True, default=str)
        write_text(folder / SCHEDULER_NAME, content + "\n")
