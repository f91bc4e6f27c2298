"""From one LoRA layout to another: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..base_models import base_model_of
from ..base_models.motion_adapter import load_motion_adapter
from ..files import disk_full_told, new_folders
from ..location import Location
from ..lora import (
    CONFIG_NAME,
    MOTION_HEAD_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    LoRA,
    lora_header,
    read_lora,
    write_lora_weights,
    write_safetensors,
    write_settings,
)
from ..lora.layouts import (
    MOTION,
    PEFT_PREFIX,
    animatediff_keys,
    kohya_header,
    kohya_tensors,
    spatial_modules,
)
from ..pipelines.loading import recorded_repositories

# What a LoRA folder may hold; replacing one leaves none of the old behind.
_LORA_FILES = (
    *(WEIGHTS_NAME, PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME, CONFIG_NAME, MOTION_HEAD_NAME),
    "scheduler/scheduler_config.json",
)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str,
    *,
    overwrite: bool = False,
    motion_adapter: str | os.PathLike | None = None,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    **hub_options,
) -> Path:
    """Write a LoRA in another layout. The tensors' values and types stay as they are.

    Where the LoRA has no settings of its own, as those of PEFT, what its base model is sampled with is written down.

    Args:
        source: A LoRA in diffusers' or PEFT's layout: a folder, a `.safetensors` file, a packaged model, a Hub id.
        destination: A folder or, if it ends in `.safetensors`, a single file.
        to: `peft` (a folder), `diffusers` (a folder or file), `kohya` or `motion-module` (a file).
        overwrite: Replace what is at `destination`; otherwise that is an error.
        motion_adapter: For `motion-module`: the motion adapter to fuse the LoRA into, as a folder or Hub id.
        subfolder, weight_name, revision, hub_options: Where in `source`, as in `from_pretrained`.

    Returns:
        `destination`.
    """
    destination = Path(destination)
    if to not in LAYOUTS:
        raise ValueError(f"Unknown layout {to!r}; valid are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[to]
    single = destination.suffix == ".safetensors"
    if not (layout.as_file if single else layout.as_folder):
        expected = "a file that ends in .safetensors" if layout.as_file else "a folder"
        raise ValueError(f"The layout {to!r} is {expected}, got {str(destination)!r}.")
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists already; choose another name, or overwrite it (--overwrite).")
    if destination.exists() and destination.is_dir() == single:
        raise FileExistsError(f"{destination} exists already and is a {'folder' if single else 'file'}.")
    where = dict(subfolder=subfolder, revision=revision, **hub_options)
    lora = read_lora(source, weight_name=weight_name, **where)
    lora.check_pairs()
    location = Location.of(source, **where)
    head = None if location.is_file else location.file(MOTION_HEAD_NAME)
    _complete(lora)
    _rebase(lora, destination.parent if single else destination)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    with disk_full_told(destination), new_folders(temporary.parent):
        try:
            temporary.mkdir()
            layout.write(lora, temporary, motion_adapter)
            if single:
                os.replace(temporary / layout.file_name, destination)
                return destination
            write_settings(temporary, lora)
            if head is not None:
                shutil.copyfile(head, temporary / MOTION_HEAD_NAME)
            _put_in_place(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return destination


def _complete(lora: LoRA) -> None:
    """Put down what `MCMPipeline.from_pretrained` would infer: base model, steps and scheduler."""
    base_model = base_model_of(lora)
    if not lora.config:
        lora.config = {
            "base_model": base_model.name,
            "base_model_repository": lora.base_repository or base_model.default_repository,
            "base_model_revision": None,
            "sampling": {"num_inference_steps": 4},
            "training": {},
        }
    if lora.scheduler_config is None:
        scheduler = base_model.scheduler_class.from_config(base_model.scheduler_config(None))
        lora.scheduler_config = json.loads(scheduler.to_json_string())


def _rebase(lora: LoRA, folder: Path) -> None:
    """What was recorded relative to where the LoRA was, relative to where it will be."""
    place = lora.folder
    if place is None:
        return

    def rebased(name: str | None) -> str | None:
        is_here = name and name.startswith(("./", "../")) and (place / name).exists()
        return hub.recordable(place / name, folder) if name and is_here else name

    config = dict(lora.config)
    config["base_model_repository"] = rebased(config.get("base_model_repository"))
    if "extra_repositories" in config:
        config["extra_repositories"] = {key: rebased(name) for key, name in config["extra_repositories"].items()}
    lora.config = config


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Move a whole folder to where there is none, or else its files over those of the LoRA that is there."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    for name in _LORA_FILES:
        if (temporary / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(temporary / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


# --- the layouts -----------------------------------------------------------------------------------------------------
def _write_diffusers(lora: LoRA, folder: Path, _) -> None:
    if lora.adapter_config == _adapter_config(lora):  # nothing of PEFT's own to be kept
        lora.adapter_config = None
    write_lora_weights(folder / WEIGHTS_NAME, lora, base_model_of(lora).denoiser_name)


def _write_peft(lora: LoRA, folder: Path, _) -> None:
    write_lora_weights(folder / PEFT_WEIGHTS_NAME, lora, PEFT_PREFIX.rstrip("."))
    config = lora.adapter_config or _adapter_config(lora)
    (folder / PEFT_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _write_kohya(lora: LoRA, folder: Path, _) -> None:
    ours = {key: value for key, value in lora_header(lora, "unet").items() if key.startswith("mcm_")}
    write_safetensors(folder / "kohya.safetensors", kohya_tensors(lora), ours | kohya_header(lora))


def _write_motion_module(lora: LoRA, folder: Path, motion_adapter: str | os.PathLike | None) -> None:
    repositories = {
        **base_model_of(lora).extra_repositories,
        **recorded_repositories(lora, {"motion_adapter": motion_adapter}),
    }
    repository = motion_adapter or repositories.get("motion_adapter")
    if repository is None:
        raise ValueError(f"{lora.source} is a LoRA for {base_model_of(lora).name}, which has no motion adapter.")
    header = {key: value for key, value in lora_header(lora, "unet").items() if key in ("format", "mcm_config")}
    write_safetensors(folder / "motion_module.safetensors", fused_motion_module(lora, repository), header)


def fused_motion_module(lora: LoRA, motion_adapter: str | os.PathLike) -> dict[str, torch.Tensor]:
    """`motion_adapter` plus what the LoRA adds to it, in the adapter's types, under AnimateDiff's keys."""
    spatial_modules(lora)  # refuses a LoRA of another model
    adapter: Any = load_motion_adapter(motion_adapter)
    weights, scales = adapter.state_dict(), lora.scales()
    for module in (module for module in lora.modules if MOTION in module):
        down, up = (lora.tensors[f"{module}.lora_{half}.weight"].float() for half in "AB")
        weight = weights.get(f"{module}.weight")
        if weight is None or weight.shape != (up.shape[0], down.shape[1]):
            found = "does not have that" if weight is None else f"has there {tuple(weight.shape)}"
            raise ValueError(
                f"{lora.source} does not fit the motion adapter {os.fspath(motion_adapter)}: it changes {module}, a"
                f" {(up.shape[0], down.shape[1])} matrix, and the adapter {found}."
            )
        weights[f"{module}.weight"] = (weight.float() + scales[module] * up @ down).to(weight.dtype)
    return animatediff_keys(weights)


def _adapter_config(lora: LoRA) -> dict:
    """adapter_config.json as PEFT would write it; a base model in a folder beside the LoRA is not named there."""
    config = lora.peft_config().to_dict()
    repository = lora.config.get("base_model_repository")
    config["base_model_name_or_path"] = repository if repository and hub.is_hub_id(repository) else None
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


@dataclass(frozen=True)
class Layout:
    write: Callable[[LoRA, Path, str | os.PathLike | None], None]
    file_name: str
    as_folder: bool = False
    as_file: bool = True


LAYOUTS = {
    "peft": Layout(_write_peft, PEFT_WEIGHTS_NAME, as_folder=True, as_file=False),
    "diffusers": Layout(_write_diffusers, WEIGHTS_NAME, as_folder=True),
    "kohya": Layout(_write_kohya, "kohya.safetensors"),
    "motion-module": Layout(_write_motion_module, "motion_module.safetensors"),
}
