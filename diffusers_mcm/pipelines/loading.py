"""What `MCMPipeline.from_pretrained` was given, and how to make a pipeline of it."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..base_models import base_model_of, base_repository_of
from ..location import INDEX_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Location
from ..lora import LoRA, open_safetensors
from .wan_files import wan_index

# What a pipeline of a checkpoint in one file is made of; a safety checker and the like are not in it.
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CHECKPOINT_INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
_PREFIXES = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "conditioner.embedders.")
_UNPACK = (
    "import sys; from diffusers import StableDiffusionPipeline as P;"
    " P.from_single_file(sys.argv[1]).save_pretrained(sys.argv[2])"
)


def read_model_index(location: Location) -> dict[str, Any] | None:
    """`model_index.json` of a pipeline, or what it would be for a single-file checkpoint; `None` for anything else."""
    if location.is_file:
        if hub.is_pickled(location.name):
            return None
        index = wan_index(location.name)
        return index or (dict(CHECKPOINT_INDEX) if is_checkpoint(location.name) else None)
    return location.json(INDEX_NAME)


def check_alone(location: Location, lora: Any, is_lora: bool) -> None:
    """`ValueError` if what is no pipeline, and motion modules unless `is_lora`, is no LoRA either, or is given one.

    A file that is named is looked for later.
    """
    if is_lora and not location.is_file and not location.weight_name and location.find_lora_file() is None:
        raise ValueError(
            f"{location} holds neither a pipeline ({INDEX_NAME}) nor a LoRA ({WEIGHTS_NAME} or {PEFT_WEIGHTS_NAME})."
            + location.elsewhere()
        )
    if lora is not None:
        what = "a LoRA" if is_lora else "motion modules"
        raise ValueError(f"`lora` goes with a base model, but {location.name} is itself {what}.")


def read_base_index(location: Location) -> dict[str, Any]:
    """`model_index.json` of a base model, or what it would be for a single-file checkpoint."""
    if location.is_file and hub.is_pickled(location.name):
        raise ValueError(f"{location.name} is not a .safetensors file; {hub.how_to_convert(location.name)}")
    if index := read_model_index(location) if location.is_file else location.json(INDEX_NAME):
        return index
    why = "the file is no checkpoint of a whole model" if location.is_file else f"it has no {INDEX_NAME}"
    raise ValueError(f"{location.name} is not a text-to-video model: {why}.")


def base_location(lora: LoRA, given: str | os.PathLike | None, options: Mapping[str, Any]) -> Location:
    """Where the base model of a LoRA is: what is `given`, or as its settings say, or else where it usually is."""
    base_model_of(lora)  # `ValueError` for a LoRA of none that is known
    if given is not None:
        return Location.of(given, **options)
    recorded = base_repository_of(lora)
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
    return name if index.get("unet") == CHECKPOINT_INDEX["unet"] else None


def recorded_repositories(lora: LoRA, given: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where the LoRA's settings say that components of its base model lie, other than in its repository.

    Those that are `given` are not looked for.
    """
    missing = [name for name in lora.settings.extra_repositories if (given or {}).get(name) is None]
    try:
        return {name: hub.resolve_recorded(lora.settings.extra_repositories[name], lora.folder) for name in missing}
    except FileNotFoundError as error:
        where = " or ".join(f"`{name}=`" for name in missing)
        raise FileNotFoundError(f"{error} Say where it is with {where}.") from error


def forget_local_paths(folder: Path) -> None:
    """Remove the paths of this machine that the libraries note down in the configurations they save."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_bytes())
        names = ("_name_or_path", "name_or_path") if isinstance(content, dict) else ()
        places = {name: content[name] for name in names if isinstance(content.get(name), str)}
        local = {name for name, place in places.items() if os.path.isabs(place) or os.path.exists(place)}
        if local:
            kept = {key: value for key, value in content.items() if key not in local}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- Stable Diffusion 1.5 in one file, as model sites offer its fine-tunes, for AnimateDiff --------------------------
def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a safetensors file holds a whole image model under the names of Stable Diffusion's first code."""
    with open_safetensors(Path(path)) as file:
        return any(key.startswith(_PREFIXES) for key in file.keys())


def load_checkpoint(path: str, config: str, dtype: torch.dtype, **options) -> dict[str, Any]:
    """`COMPONENTS` of a single-file checkpoint, by diffusers' own reader.

    `config` is the folder or repository of a Stable Diffusion 1.5: configurations and tokenizer, which are not in the
    file, come from there, and no weights. `options` are those to find it with. `ValueError` if the file is another
    model's, or incomplete.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type

    with open_safetensors(Path(path)) as file:
        shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
    if (kind := infer_diffusers_model_type(shapes)) != "v1":
        raise ValueError(
            f"{path} is a single-file checkpoint of another model ({kind}); AnimateDiff's motion modules go with"
            " Stable Diffusion 1.5 and its text-to-image fine-tunes."
        )
    nothing = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    with tempfile.TemporaryDirectory() as folder:
        link = Path(path)
        if link.suffix != ".safetensors":  # by which diffusers tells it from a pickle
            link = Path(folder, "checkpoint.safetensors")
            link.symlink_to(Path(path).resolve())
        try:
            found = StableDiffusionPipeline.from_single_file(
                str(link), config=config, dtype=dtype, requires_safety_checker=False, **nothing, **options
            )
        except hub.http_errors() as error:
            raise OSError(_advice(path, f"its configurations cannot be read from {config} ({error})")) from error
        except (SingleFileComponentError, KeyError, ValueError) as error:
            raise ValueError(_advice(path, f"diffusers cannot read it ({type(error).__name__}: {error})")) from error
    components = {name: getattr(found, name) for name in COMPONENTS}
    for name in ("unet", "vae", "text_encoder"):
        missing = [key for key, parameter in components[name].named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(_advice(path, f"it lacks {len(missing)} weights of the {name}, such as {missing[0]!r}"))
        components[name].eval()
    return components


def how_to_unpack(path: str | os.PathLike) -> str:
    """A command that makes a folder in diffusers' layout of a single-file checkpoint."""
    path = Path(path)
    return f'python -c "{_UNPACK}" {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix("")))}'


def _advice(path: str, problem: str) -> str:
    return (
        f"{path} is a single-file checkpoint, and {problem}. `config=` names another folder or repository with the"
        f" configurations of a Stable Diffusion 1.5; or make a folder of the file: {how_to_unpack(path)}"
    )
