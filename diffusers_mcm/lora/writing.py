"""A LoRA as a file, or as the folder that `MCMPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import hub
from ..files import whole_file, whole_files, write_text
from .adapter import CONFIG_NAME, DEFAULT_ADAPTER, HEADER_KEYS, METADATA_KEY, WEIGHTS_NAME, LoRA
from .layers import extract_lora


def write_lora_weights(
    path: str | os.PathLike, lora: LoRA, prefix: str = "unet", dtype: torch.dtype | None = None
) -> None:
    """A safetensors file with `unet.*` keys and the metadata that diffusers' `load_lora_weights` reads, and ours."""
    tensors = {
        f"{prefix}.{key}": tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for key, tensor in sorted(lora.tensors.items())
    }
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
    for key, attribute in HEADER_KEYS.items():
        if getattr(lora, attribute):
            header[key] = json.dumps(getattr(lora, attribute), sort_keys=True, default=str)
    return header


def write_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Whole or not at all, readable by whom the umask allows, and the same bytes each time.

    `save_file` writes for its own user only, and the metadata in an order that it draws.
    """
    from safetensors.torch import save

    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")  # the header's length, the header (JSON), the tensors
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as file:
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
    relative_to: str | os.PathLike | None = None,
) -> Path:
    """Write the LoRA folder that `MCMPipeline.from_pretrained` reads.

    `base_model` is a `BaseModel`; `repository`, `revision` and `extra_repositories` say where its weights came from (a
    local folder is recorded relative to `folder`, or to `relative_to` if the files will be moved there); `sampling`
    holds `num_inference_steps`, `num_frames`, `height`, `width`, `fps`; `scheduler` is the one to sample with.
    """
    folder = Path(folder)
    lora = extract_lora(denoiser, adapter_name)
    lora.config = {
        "base_model": base_model.name,
        "base_model_repository": hub.recordable(repository or base_model.default_repository, relative_to or folder),
        "base_model_revision": revision,
        "extra_repositories": {
            name: hub.recordable(place, relative_to or folder) for name, place in (extra_repositories or {}).items()
        },
        "sampling": dict(sampling or {}),
        "training": dict(training or {}),
    }
    lora.scheduler_config = None if scheduler is None else json.loads(scheduler.to_json_string())
    write_lora_folder(folder, lora, base_model.denoiser_name, dtype)
    return folder


def write_lora_folder(folder: Path, lora: LoRA, prefix: str, dtype: torch.dtype | None = None) -> None:
    """The weights and the settings beside them, all of it or nothing; other files in the folder stay."""
    with whole_files(folder, WEIGHTS_NAME) as temporary:
        write_lora_weights(temporary / WEIGHTS_NAME, lora, prefix, dtype)
        write_settings(temporary, lora)


def write_settings(folder: Path, lora: LoRA) -> None:
    """The files beside the weights: mcm_config.json and scheduler/scheduler_config.json, where there is either."""
    settings = {CONFIG_NAME: lora.config or None, "scheduler/scheduler_config.json": lora.scheduler_config}
    for name, content in settings.items():
        if content is not None:
            write_text(folder / name, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
