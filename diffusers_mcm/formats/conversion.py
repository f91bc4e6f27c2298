"""From one LoRA layout to another: whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from .. import hub
from ..base_models import base_model_of, base_repository_of, half_named
from ..base_models.animatediff import load_motion_adapter
from ..files import atomic_file, atomic_files
from ..location import MOTION_HEAD_NAME, PEFT_WEIGHTS_NAME, SCHEDULER_NAME, WEIGHTS_NAME, Location
from ..lora import (
    PAIR_NAMES,
    LoRA,
    check_alike,
    lora_header,
    read_loras,
    write_lora_weights,
    write_safetensors,
    write_settings,
)
from ..lora.adapter import PEFT_CONFIG_NAME
from ..lora.layouts import (
    MOTION,
    PEFT_PREFIX,
    animatediff_keys,
    comfyui_tensors,
    kohya_header,
    kohya_tensors,
    spatial_modules,
)
from ..pipelines.loading import recorded_repositories
from ..settings import CONFIG_NAME, DEFAULT_STEPS, SamplingDefaults, Settings

# What a LoRA folder may hold; replacing one leaves none of the old behind.
_LORA_FILES = (
    *(WEIGHTS_NAME, PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME, CONFIG_NAME, MOTION_HEAD_NAME, SCHEDULER_NAME),
    *PAIR_NAMES.values(),
)


def convert(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    destination: str | os.PathLike,
    to: str,
    *,
    overwrite: bool = False,
    motion_adapter: str | os.PathLike | None = None,
    **where,
) -> Path:
    """Write a LoRA in another layout. The tensors' values and types stay as they are; what a layout cannot hold is
    not left out, but refused.

    Where the LoRA has no settings of its own, as those of PEFT, what its base model is sampled with is written down.
    The pair for two experts is converted together, into a folder with `high_noise_model.safetensors` and
    `low_noise_model.safetensors`. Returns `destination`.

    Args:
        source: A LoRA in diffusers' or PEFT's layout, or for Wan in any: a folder, a `.safetensors` file, a packaged
            model, a Hub id. A pair is a folder or repository with both its files, or two of all these, (high, low).
        destination: A folder or, if it ends in `.safetensors`, a single file.
        to: `peft` (a folder), `diffusers` (a folder or file), `comfyui`, `kohya` or `motion-module` (a file).
        overwrite: Replace what is at `destination`; otherwise that is an error.
        motion_adapter: For `motion-module`: the motion adapter to fuse the LoRA into, as a folder or Hub id.
        where: Where in `source`, as in `from_pretrained`: `subfolder`, `weight_name`, `revision`, `token`, ...
    """
    destination = Path(destination)
    single = destination.suffix == ".safetensors"
    _check_destination(destination, to, overwrite)
    read = read_loras(source, **where)
    loras = [half_named(read)] if isinstance(read, LoRA) else list(read)
    if len(loras) == 2:
        _check_pair(loras, to, single)
    layout = _layout(destination, to, for_pair=len(loras) == 2)
    for lora in loras:
        lora.check_pairs()
        if layout.fused and motion_adapter is None:
            motion_adapter = _recorded_adapter(lora)
        _complete(lora)
        lora.settings = lora.settings.moved(lora.folder, destination.parent if single else destination)
    if single:
        with atomic_file(destination) as temporary:
            layout.write(loras[0], temporary, motion_adapter)
    elif len(loras) == 2:
        _write_pair(loras, destination, layout)
    else:
        location = Location.of(cast(str, source), **where)
        head = None if location.is_file else location.file(MOTION_HEAD_NAME)
        with atomic_files(destination, layout.file_name, stale=_LORA_FILES) as temporary:
            layout.write(loras[0], temporary / layout.file_name, motion_adapter)
            write_settings(temporary, loras[0])
            if head is not None:
                shutil.copyfile(head, temporary / MOTION_HEAD_NAME)
    return destination


def _layout(destination: Path, to: str, for_pair: bool) -> "Layout":
    """The layout; `ValueError` if it is not written where it should be."""
    if to not in LAYOUTS:
        raise ValueError(f"Unknown layout {to!r}; valid are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[to]
    single = destination.suffix == ".safetensors"
    if not (layout.as_file if single else layout.as_folder or for_pair and layout.as_pair):
        expected = "a file that ends in .safetensors" if layout.as_file else "a folder"
        raise ValueError(f"The layout {to!r} is {expected}, got {str(destination)!r}.")
    return layout


def _check_destination(destination: Path, to: str, overwrite: bool) -> None:
    """What can be told before anything is read."""
    _layout(destination, to, for_pair=True)
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists already; choose another name, or overwrite it (--overwrite).")
    if destination.exists() and destination.is_dir() == (destination.suffix == ".safetensors"):
        kind = "folder" if destination.is_dir() else "file"
        raise FileExistsError(f"{destination} exists already and is a {kind}.")


def _check_pair(loras: Sequence[LoRA], to: str, single: bool) -> None:
    """`ValueError` where a pair does not go together, or not into that layout."""
    check_alike(*loras)
    names = " and ".join(PAIR_NAMES.values())
    files = list(dict.fromkeys(lora.source for lora in loras))
    have, alone = "are", "name its file (--weight_name)"
    if len(files) == 1:
        have, alone = "holds", "convert both to a folder first, and then its file there"
    if not LAYOUTS[to].as_pair:
        raise ValueError(
            f"{' and '.join(files)} {have} the pair for two experts, which is written as"
            f" {' or '.join(name for name, layout in LAYOUTS.items() if layout.as_pair)}, not as {to}. For one of them"
            f" alone {alone}."
        )
    if single:
        raise ValueError(
            f"The pair for two experts is two files, {names}, in a folder; got a file to write. Name a folder, or for"
            f" one of them alone {alone}."
        )


def _write_pair(loras: Sequence[LoRA], destination: Path, layout: "Layout") -> None:
    """Write both files, each with all that is known of its LoRA in its header."""
    names = list(PAIR_NAMES.values())
    with atomic_files(destination, names[-1], stale=_LORA_FILES) as temporary:
        for name, lora in zip(names, loras):
            layout.write(lora, temporary / name, None)


def _complete(lora: LoRA) -> None:
    """Put down what `MCMPipeline.from_pretrained` would infer: base model, steps and scheduler."""
    base_model = base_model_of(lora)
    if not replace(lora.settings, expert=None):
        lora.settings = Settings(
            base_model=base_model.name,
            base_model_repository=base_repository_of(lora),
            expert=lora.settings.expert,
            sampling=SamplingDefaults(DEFAULT_STEPS),
        )
    if lora.scheduler_config is None:
        known = {} if lora.settings.boundary is None else {"boundary": lora.settings.boundary}
        scheduler = base_model.scheduler_class.from_config(base_model.scheduler_config(known))
        lora.scheduler_config = json.loads(scheduler.to_json_string())


def _recorded_adapter(lora: LoRA) -> str:
    """The motion adapter that a LoRA was trained with; `ValueError` for a LoRA of a model that has none."""
    base_model = base_model_of(lora)
    repositories = {**base_model.extra_repositories, **recorded_repositories(lora)}
    if "motion_adapter" not in repositories:
        raise ValueError(f"{lora.source} is a LoRA for {base_model.name}, which has no motion adapter.")
    return repositories["motion_adapter"]


# --- the layouts -----------------------------------------------------------------------------------------------------
def _write_diffusers(lora: LoRA, path: Path, _) -> None:
    lora.check_no_differences("diffusers' layout has no names for that")
    if lora.adapter_config == _adapter_config(lora):  # nothing of PEFT's own to be kept
        lora.adapter_config = None
    write_lora_weights(path, {base_model_of(lora).denoiser_name: lora})


def _write_peft(lora: LoRA, path: Path, _) -> None:
    lora.check_no_differences("PEFT's layout has no names for that")
    write_lora_weights(path, {PEFT_PREFIX.rstrip("."): lora})
    config = lora.adapter_config or _adapter_config(lora)
    path.with_name(PEFT_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _write_kohya(lora: LoRA, path: Path, _) -> None:
    ours = {key: value for key, value in lora_header(lora, "unet").items() if key.startswith("mcm_")}
    write_safetensors(path, kohya_tensors(lora), ours | kohya_header(lora))


def _write_comfyui(lora: LoRA, path: Path, _) -> None:
    """Not with diffusers' metadata, by which its reader would scale a second time."""
    ours = {key: value for key, value in lora_header(lora, "transformer").items() if key.startswith("mcm_")}
    write_safetensors(path, comfyui_tensors(lora), ours | {"format": "pt"})


def _write_motion_module(lora: LoRA, path: Path, motion_adapter: Any) -> None:
    """`motion_adapter` plus what the LoRA adds to it, in the adapter's types, under AnimateDiff's keys."""
    header = {key: value for key, value in lora_header(lora, "unet").items() if key in ("format", "mcm_config")}
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
    write_safetensors(path, animatediff_keys(weights), header)


def _adapter_config(lora: LoRA) -> dict:
    """adapter_config.json as PEFT would write it; a base model in a folder beside the LoRA is not named there."""
    config = lora.peft_config().to_dict()
    repository = lora.settings.base_model_repository
    config["base_model_name_or_path"] = repository if repository and hub.is_hub_id(repository) else None
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


@dataclass(frozen=True)
class Layout:
    write: Callable[[LoRA, Path, str | os.PathLike | None], None]
    file_name: str  # of the weights in a folder
    as_folder: bool = False
    as_file: bool = True
    as_pair: bool = False  # as two files in a folder
    fused: bool = False  # into a motion adapter


LAYOUTS = {
    "peft": Layout(_write_peft, PEFT_WEIGHTS_NAME, as_folder=True, as_file=False),
    "diffusers": Layout(_write_diffusers, WEIGHTS_NAME, as_folder=True, as_pair=True),
    "comfyui": Layout(_write_comfyui, "comfyui.safetensors", as_pair=True),
    "kohya": Layout(_write_kohya, "kohya.safetensors"),
    "motion-module": Layout(_write_motion_module, "motion_module.safetensors", fused=True),
}
