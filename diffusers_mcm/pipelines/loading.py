"""What `MCMPipeline.from_pretrained` was given, and how to make a pipeline of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import hub
from ..lora import PEFT_WEIGHTS_NAME, WEIGHTS_NAME, LoRA, elsewhere, find_lora_file
from . import single_file

HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
SAMPLING_KEYS = ("num_inference_steps", "num_frames", "height", "width", "fps")


def read_model_index(source: str, *, weight_name: str | None = None, **where) -> dict[str, Any] | None:
    """`model_index.json` of a pipeline, or what it would be for a single-file checkpoint; `None` if `source` is a
    LoRA (of which the file `weight_name` is looked for later); an error if it is neither."""
    if os.path.isfile(source):
        whole = not hub.is_pickled(source) and single_file.is_checkpoint(source)
        return dict(single_file.INDEX) if whole else None
    index = hub.read_json(source, "model_index.json", **where)
    if index is None and not weight_name and find_lora_file(source, **where) is None:
        place = f"{source} (subfolder {where['subfolder']!r})" if where.get("subfolder") else source
        raise ValueError(
            f"{place} holds neither a pipeline (model_index.json) nor a LoRA ({WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME})."
            + elsewhere(source, **where)
        )
    return index


def read_base_index(source: str, **where) -> dict[str, Any] | None:
    """`model_index.json` of a base model, or what it would be for a single-file checkpoint."""
    if not os.path.isfile(source):
        return hub.read_json(source, "model_index.json", **where)
    if hub.is_pickled(source):
        raise ValueError(f"{source} is not a .safetensors file; {hub.how_to_convert(source)}")
    index = read_model_index(source)
    if index is None:
        raise ValueError(f"{source} is not a text-to-video model: the file is no checkpoint of a whole model.")
    return index


def checkpoint_config(lora: LoRA, **options) -> str | None:
    """The base model that a LoRA names, if a single-file checkpoint can take its configurations from there."""
    try:
        name = lora.base_repository and hub.resolve_recorded(lora.base_repository, lora.folder)
        if name is None or os.path.isfile(name):
            return None
        index = hub.read_json(name, "model_index.json", **options) or {}
    except OSError:  # it is not here, or not to be had; its default is then
        return None
    return name if index.get("unet") == single_file.INDEX["unet"] else None


def recorded_repositories(lora: LoRA, given: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where the LoRA's configuration says that parts of its base model lie, other than in its repository.

    Those that are `given` are not looked for.
    """
    recorded = lora.config.get("extra_repositories") or {}
    missing = {name: place for name, place in recorded.items() if (given or {}).get(name) is None}
    try:
        return {name: hub.resolve_recorded(place, lora.folder) for name, place in missing.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Say where it is with {' or '.join(f'`{name}=`' for name in missing)}."
        ) from error


def is_saved_mcm_pipeline(model_index: Mapping[str, Any]) -> bool:
    return str(model_index.get("_class_name")).endswith("MCMPipeline")


def fetched(source: str, revision: str | None, **options) -> str:
    """The folder of a saved MCM pipeline. diffusers does not download components whose class is not its own."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, revision=revision, **options)
    except hub.http_errors() as error:
        raise OSError(hub.explain(error, source, revision)) from error


def few_step_scheduler(base_model, scheduler):
    """The few-step scheduler on the noise schedule that the base model was trained with."""
    if isinstance(scheduler, base_model.scheduler_class):
        return scheduler
    keys = base_model.noise_schedule_keys
    config = {key: scheduler.config[key] for key in keys if scheduler.config.get(key) is not None}
    config = base_model.scheduler_config(config)
    return base_model.scheduler_class.from_config({key: config[key] for key in keys if key in config})


def forget_local_paths(folder: Path) -> None:
    """Remove the paths of this machine that the libraries note down in the configurations they save."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            continue
        local = [
            key
            for key in ("_name_or_path", "name_or_path")
            if isinstance(content.get(key), str) and (os.path.isabs(content[key]) or os.path.exists(content[key]))
        ]
        if local:
            for key in local:
                del content[key]
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
