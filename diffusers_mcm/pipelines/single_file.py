"""Stable Diffusion 1.5 in one file, as model sites offer its fine-tunes, for AnimateDiff's image network."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..lora import open_safetensors

# What a pipeline of such a file is made of; a safety checker and the like are not in it.
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
_PREFIXES = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "conditioner.embedders.")
_UNPACK = (
    "import sys; from diffusers import StableDiffusionPipeline as P;"
    " P.from_single_file(sys.argv[1]).save_pretrained(sys.argv[2])"
)


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
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    _check_kind(path)
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


def _check_kind(path: str) -> None:
    """`ValueError` unless the shapes are those of a Stable Diffusion 1."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    with open_safetensors(Path(path)) as file:
        shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
    kind = infer_diffusers_model_type(shapes)
    if kind != "v1":
        raise ValueError(
            f"{path} is a single-file checkpoint of another model ({kind}); AnimateDiff's motion modules go with"
            " Stable Diffusion 1.5 and its text-to-image fine-tunes."
        )


def how_to_unpack(path: str | os.PathLike) -> str:
    """A command that makes a folder in diffusers' layout of a single-file checkpoint."""
    path = Path(path)
    return f'python -c "{_UNPACK}" {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix("")))}'


def _advice(path: str, problem: str) -> str:
    return (
        f"{path} is a single-file checkpoint, and {problem}. `config=` names another folder or repository with the"
        f" configurations of a Stable Diffusion 1.5; or make a folder of the file: {how_to_unpack(path)}"
    )
