"""A LoRA file is read by component: denoiser and text encoder, in whatever naming.

Every key is accounted for: it is the place of one tensor in one of the components, or the file is refused. One file
may mix namings, ranks, scales and types.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..location import Location
from .adapter import LoRA, split_key
from .files import read_lora_file, to_loras
from .layers import ADAPTABLE, base_layer, check_not_wrapped
from .layouts import (
    DENOISER,
    DIFFERENCES,
    SECOND_DENOISER,
    TEXT_ENCODER,
    check_no_dora,
    is_denoisers,
    is_wan,
    original_name,
    place_of,
    recorded_config,
    split_prefix,
)
from .sorting import PAIR, sort_tensors, why_strange
from .wan_names import wan_module

MOTION_LORA_NAME = "diffusion_pytorch_model.safetensors"  # what AnimateDiff's motion LoRAs on the Hub are called
BUNDLED = "bundle_emb."  # textual inversions that OneTrainer puts in the same file


def read_components(
    source: str | os.PathLike | Location | LoRA | Mapping[str, torch.Tensor],
    components: Mapping[str, nn.Module],
    **options,
) -> dict[str, LoRA]:
    """Read a LoRA for each component. `components` holds the denoiser first, and what else a LoRA may lie on.

    `source` is a folder, file, packaged model or Hub repository (`options`: `subfolder`, `weight_name`, `revision`,
    ...), a `LoRA` for the denoiser, or the tensors by their keys.
    """
    components = dict(components)
    denoiser = next(iter(components))
    if isinstance(source, LoRA):
        return {denoiser: _shaped(source, components[denoiser])}
    if isinstance(source, Mapping):
        return split_components(source, {}, components, "the LoRA")
    file = read_lora_file(Location.of(source, **options), MOTION_LORA_NAME)
    as_in_memory = all(split_key(key)[1] in PAIR for key in file.tensors)
    if (as_in_memory and all(map(is_denoisers, file.tensors))) or _of_wan_alone(file.tensors):
        loras = {component or denoiser: lora for component, lora in to_loras(file).items()}  # with settings beside it
        _check_components(loras, components, str(file.path))
        return {component: _shaped(lora, components[component]) for component, lora in loras.items()}
    return split_components(file.tensors, file.header, components, str(file.path))


def _of_wan_alone(keys: Iterable[str]) -> bool:
    """Whether all keys are for Wan's denoisers, so that they need no network to be sorted."""
    keys = list(keys)
    return is_wan(keys) and all(split_prefix(key)[1] != TEXT_ENCODER for key in keys)


def _check_components(found: Collection[str], components: Collection[str], source: str) -> None:
    missing = [name for name in found if name not in components]
    if missing:
        raise ValueError(
            f"{source} holds a LoRA for the {missing[0]}, and this pipeline has no such network, but"
            f" {', '.join(components)}. It was made for a base model with two experts, such as Wan 2.2 A14B."
        )


def split_components(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], components: Mapping[str, nn.Module], source: str
) -> dict[str, LoRA]:
    """Sort tensors into a LoRA for each component, under the names that its modules have."""
    check_no_dora(source, tensors)
    names = {component: _known_names(module) for component, module in components.items()}
    denoiser, of_wan = next(iter(components)), is_wan(tensors)

    def place(key: str, tensor: torch.Tensor) -> tuple[str, str | None, str]:
        component, module, role = place_of(key)
        component = component or denoiser
        if role in DIFFERENCES:
            return component, module if of_wan and wan_module(module) == module else None, role
        return component, names.get(component, {}).get(module) if role else None, role

    def config(component: str) -> dict:
        return recorded_config(header, component=DENOISER if component == denoiser else component)

    loras, strange = sort_tensors(tensors, place, source, config)
    if strange or not any(lora.tensors for lora in loras.values()):
        _check_components({split_prefix(key)[1] for key in strange} & {SECOND_DENOISER}, components, source)
        raise ValueError(_why_not(strange, len(tensors), components, source))
    return {component: _shaped(lora, components[component]) for component, lora in loras.items()}


def _known_names(network: nn.Module) -> dict[str, str]:
    """Every name a file may give a module of the network, and the one it has."""
    names: dict[str, str] = {}
    for name, module in network.named_modules():
        if isinstance(base_layer(module), ADAPTABLE):
            # transformers once had CLIP's text model one level deeper.
            for alias in (name, f"text_model.{name}", name.removeprefix("text_model."), original_name(name, network)):
                names.setdefault(alias, name)
                names.setdefault(alias.replace(".", "_"), name)
    return names


def _shaped(lora: LoRA, network: nn.Module) -> LoRA:
    """The LoRA with matrices where the network has matrices, and convolutions where it has those; some trainers write
    all as one of them."""
    modules = {name: base_layer(module) for name, module in network.named_modules()}
    shaped = {}
    for key, tensor in lora.tensors.items():
        name, half = split_key(key)
        weight = getattr(modules.get(name), "weight", None)
        shaped[key] = tensor if weight is None else _of_as_many_dimensions(tensor, weight, half)
    changed = any(shaped[key] is not tensor for key, tensor in lora.tensors.items())
    return replace(lora, tensors=shaped) if changed else lora


def _of_as_many_dimensions(tensor: torch.Tensor, weight: torch.Tensor, half: str) -> torch.Tensor:
    """Make a matrix a convolution, or one of a single pixel a matrix, as the weight is."""
    if tensor.ndim == 2 and weight.ndim > 2:
        own = weight.shape[1:]
        if half == PAIR[0] and own.numel() == tensor.shape[1]:
            return tensor.reshape(len(tensor), *own)
        return tensor.reshape(*tensor.shape, *[1] * (weight.ndim - 2))
    if weight.ndim == 2 < tensor.ndim and tensor.shape[2:].numel() == 1:
        return tensor.flatten(1)
    return tensor


def _why_not(strange: list[str], count: int, components: Mapping[str, nn.Module], source: str) -> str:
    """What is wrong with a file of which these keys have no place, and what to do."""
    for network in components.values():
        check_not_wrapped(network, source)
    bundled = sorted({key.removeprefix(BUNDLED).rpartition(".")[0] for key in strange if key.startswith(BUNDLED)})
    if bundled:
        return (
            f"{source} bundles textual inversions with the LoRA ({', '.join(bundled)}; keys {BUNDLED}*). Load the rest"
            f" as load_lora_weights({{k: v for k, v in load_file(path).items() if not k.startswith({BUNDLED!r})}}),"
            " with `load_file` of `safetensors.torch`, and those with `load_textual_inversion`."
        )
    kinds = " or ".join(type(network).__name__ for network in components.values())
    reason = why_strange(strange) or "was made for another base model, or is another kind of adapter"
    return (
        f"{source} does not fit: {len(strange)} of its {count} keys are no part of a LoRA for this {kinds}"
        f"{f', such as {strange[0]!r}' if strange else ''}. It {reason}."
    )
