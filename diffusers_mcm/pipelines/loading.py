"""What `MCMPipeline.from_pretrained` was given, and how to make a pipeline of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import hub
from ..base_models import base_model_of
from ..location import INDEX_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Location
from ..lora import LoRA
from . import single_file


def read_model_index(location: Location) -> dict[str, Any] | None:
    """`model_index.json` of a pipeline, or what it would be for a single-file checkpoint; `None` for a LoRA (of which
    a file that is named is looked for later); an error if there is neither."""
    if location.is_file:
        whole = not hub.is_pickled(location.name) and single_file.is_checkpoint(location.name)
        return dict(single_file.INDEX) if whole else None
    index = location.json(INDEX_NAME)
    if index is None and not location.weight_name and location.find_lora_file() is None:
        raise ValueError(
            f"{location} holds neither a pipeline ({INDEX_NAME}) nor a LoRA ({WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME})."
            + location.elsewhere()
        )
    return index


def read_base_index(location: Location) -> dict[str, Any]:
    """`model_index.json` of a base model, or what it would be for a single-file checkpoint."""
    if location.is_file and hub.is_pickled(location.name):
        raise ValueError(f"{location.name} is not a .safetensors file; {hub.how_to_convert(location.name)}")
    index = read_model_index(location) if location.is_file else location.json(INDEX_NAME)
    if index is None:
        why = "the file is no checkpoint of a whole model" if location.is_file else f"it has no {INDEX_NAME}"
        raise ValueError(f"{location.name} is not a text-to-video model: {why}.")
    return index


def base_location(lora: LoRA, given: str | os.PathLike | None, options: Mapping[str, Any]) -> Location:
    """Where the base model of a LoRA is: what is `given`, or as its settings say, or else where it usually is."""
    base_model = base_model_of(lora)
    if given is not None:
        return Location.of(given, **options)
    recorded = lora.base_repository or base_model.default_repository
    try:
        name = hub.resolve_recorded(recorded, lora.folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Say where it is with `base_model=`.") from error
    return Location.of(name, revision=lora.settings.base_model_revision, **options)


def checkpoint_config(lora: LoRA, options: Mapping[str, Any]) -> str | None:
    """The base model that a LoRA names, if a single-file checkpoint can take its configurations from there."""
    try:
        name = lora.base_repository and hub.resolve_recorded(lora.base_repository, lora.folder)
        if name is None or (location := Location.of(name, **options)).is_file:
            return None
        index = location.json(INDEX_NAME) or {}
    except OSError:  # it is not here, or not to be had; its default is then
        return None
    return name if index.get("unet") == single_file.INDEX["unet"] else None


def recorded_repositories(lora: LoRA, given: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where the LoRA's settings say that components of its base model lie, other than in its repository.

    Those that are `given` are not looked for.
    """
    missing = [name for name in lora.settings.extra_repositories if (given or {}).get(name) is None]
    try:
        return {name: hub.resolve_recorded(lora.settings.extra_repositories[name], lora.folder) for name in missing}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Say where it is with {' or '.join(f'`{name}=`' for name in missing)}."
        ) from error


def is_saved_mcm_pipeline(model_index: Mapping[str, Any]) -> bool:
    return str(model_index.get("_class_name")).endswith("MCMPipeline")


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
