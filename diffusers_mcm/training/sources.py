"""What a run reads, looked at before anything large is loaded: a wrong path is told in a second."""

import importlib
from typing import Any

import torch

from ..base_models.base import component_class
from ..location import Location
from ..lora import find_pair
from .config import TrainingConfig
from .networks import components_elsewhere, teacher_index, teacher_location


def check_sources(config: TrainingConfig, remote: bool) -> None:
    """Raise ValueError or OSError, with the flag, if a network that the run needs is not where it is said to be.

    Either the Hub is asked (`remote`), which may take its time, or what is on this machine is looked at.
    """
    for name, place in components_elsewhere(config).items():
        _check_network(f"--extra_repositories {name}=", place, remote)
    if config.adversarial:
        for flag in ("discriminator_features", "discriminator_text"):
            _check_network(f"--{flag} ", getattr(config, flag), remote)
    if config.pretrained_lora:
        lora = Location.of(config.pretrained_lora, subfolder=config.pretrained_lora_subfolder)
        if lora.remote == remote and find_pair(lora) is None:
            lora.lora_file()


def _check_network(flag: str, place: str, remote: bool) -> None:
    try:
        location = Location.of(place)
        found = location.remote != remote or location.json("config.json") is not None
    except (OSError, ValueError) as error:
        raise type(error)(f"{flag}{place}: {error}") from error
    if not found:
        raise ValueError(f"{flag}{place} is not a network: there is no config.json.")


def planned_clip_size(config: TrainingConfig) -> tuple[int, int, int]:
    """Frames, height and width of the clips, from the teacher's configurations; its weights are not read.

    `ValueError` for a size that the teacher has no latents for.
    """
    base, index = teacher_index(config)
    location = teacher_location(config)
    denoiser, vae = (_without_weights(location, index, name) for name in (base.denoiser_name, "vae"))

    def size(name: str) -> int:
        return getattr(config, name) or index.get(name) or base.sampling_default(name, denoiser, vae)

    sizes = size("num_frames"), size("height"), size("width")
    base.latent_shape(denoiser, vae, *sizes)
    return sizes


def _without_weights(location: Location, index: dict[str, Any], name: str) -> torch.nn.Module:
    """A component of a pipeline on the meta device, made from its configuration."""
    kind = component_class(index, name)
    values = location.inside(name).json("config.json")
    if kind is None or values is None:
        raise ValueError(f"{location.name} is not a text-to-video model: it has no {name}/config.json.")
    library = importlib.import_module(index[name][0])  # as diffusers does to load it
    with torch.device("meta"):
        return getattr(library, kind).from_config(values)
