"""A LoRA file is read by component: denoiser and text encoder, in whatever naming.

Every key is accounted for: it is the place of one tensor in one of the components, or the file is refused. One file
may mix namings, ranks, scales and types.
"""

import os
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from ..location import Location
from .adapter import LoRA, split_key
from .files import read_lora_file, to_lora
from .layers import ADAPTABLE, base_layer, check_not_wrapped
from .layouts import (
    DENOISER,
    TEXT_ENCODER,
    check_no_dora,
    is_denoisers,
    original_name,
    recorded_config,
    renamed,
    set_scale,
    split_prefix,
)

MOTION_LORA_NAME = "diffusion_pytorch_model.safetensors"  # what AnimateDiff's motion LoRAs on the Hub are called
BUNDLED = "bundle_emb."  # textual inversions that OneTrainer puts in the same file
# What is in the keys of adapters that are no LoRA.
_OTHER_KINDS = {
    **dict.fromkeys((".hada_w1", ".hada_w2"), "LoHa"),
    **dict.fromkeys((".lokr_w1", ".lokr_w2"), "LoKr"),
    ".lora_mid.": "LoCon with a third matrix (lora_mid)",
    ".oft_": "OFT",
    ".on_input": "IA3",
    ".diff": "difference of whole weights",
}


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
        return {denoiser: source}
    if isinstance(source, Mapping):
        return split_components(source, {}, components, "the LoRA")
    file = read_lora_file(Location.of(source, **options), MOTION_LORA_NAME)
    as_in_memory = all(split_key(key)[1] in ("lora_A.weight", "lora_B.weight") for key in file.tensors)
    if as_in_memory and all(map(is_denoisers, file.tensors)):
        return {denoiser: to_lora(file)}  # with the settings beside it
    return split_components(file.tensors, file.header, components, str(file.path))


def split_components(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], components: Mapping[str, nn.Module], source: str
) -> dict[str, LoRA]:
    """Sort tensors into a LoRA for each component, under the names that its modules have."""
    check_no_dora(source, tensors)
    names = {component: _known_names(module) for component, module in components.items()}
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    alphas: dict[str, dict[str, float]] = defaultdict(dict)
    seen: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for key, tensor in tensors.items():
        component, module, half = _place(key, names)
        place = f"{module}.{half}"
        if module is None or (half == "alpha" and tensor.numel() != 1):
            strange.append(key)
        elif place in seen[component]:
            other = seen[component][place]
            raise ValueError(f"{source} holds {place} of the {component} twice, as {other!r} and as {key!r}.")
        elif half == "alpha":
            alphas[component][module] = float(tensor)
        else:
            weight = base_layer(components[component].get_submodule(module)).weight
            found[component][place] = _of_as_many_dimensions(tensor, weight.ndim)
        seen[component][place] = key
    if strange or not found:
        raise ValueError(_why_not(strange, len(tensors), components, source))
    loras = {component: LoRA(own, source=source) for component, own in found.items()}
    for component, lora in loras.items():
        owner = TEXT_ENCODER if component == TEXT_ENCODER else DENOISER
        set_scale(lora, recorded_config(header, component=owner), alphas[component])
    return loras


def _place(key: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str | None, str]:
    """`lora_unet_mid_block_resnets_0_conv1.lora_down.weight` to (`unet`, `mid_block.resnets.0.conv1`,
    `lora_A.weight`); no module if there is none of that name."""
    _, component, name = split_prefix(key)
    module, half = split_key(renamed(name, component))
    if name.endswith(".alpha"):
        module, half = renamed(name, component).removesuffix(".alpha"), "alpha"
    component = component or next(iter(names))
    known = names.get(component, {}).get(module)
    return component, known if half in ("lora_A.weight", "lora_B.weight", "alpha") else None, half


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


def _of_as_many_dimensions(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Make a matrix a convolution of one pixel, or the reverse; some trainers write all as one of them."""
    if tensor.ndim == 2 and dimensions > 2:
        return tensor.reshape(*tensor.shape, *[1] * (dimensions - 2))
    if dimensions == 2 < tensor.ndim and tensor.shape[2:].numel() == 1:
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
    what = (kind for part, kind in _OTHER_KINDS.items() if any(part in key for key in strange))
    other = "was made for another base model, or is another kind of adapter"
    reason = next((f"is a {kind}, and only plain LoRA is supported" for kind in what), other)
    return (
        f"{source} does not fit: {len(strange)} of its {count} keys are no part of a LoRA for this {kinds}"
        f"{f', such as {strange[0]!r}' if strange else ''}. It {reason}."
    )
