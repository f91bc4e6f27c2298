"""LoRAs as the world of Stable Diffusion writes them: several namings, and a part for the text encoder.

Whatever the naming, the result is a `LoRA` for each component, and every key is accounted for: it is the place of one
tensor in one of the components, or the file is refused. One file may mix namings, ranks, scales and types.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..location import Location
from ..lora import (
    METADATA_KEY,
    PEFT_PREFIX,
    LoRA,
    base_layer,
    check_not_wrapped,
    lora_header,
    read_lora_file,
    split_key,
    to_lora,
    write_safetensors,
)
from .original_names import original_name

TEXT_ENCODER = "text_encoder"
MOTION_LORA_NAME = "diffusion_pytorch_model.safetensors"  # what AnimateDiff's motion LoRAs on the Hub are called
# What a key starts with, and the component it belongs to ("": the denoiser). kohya first, whose names have no dots.
_PREFIXES = {
    "lora_unet_": "",
    "lora_unet.": "",
    **dict.fromkeys(("lora_te_", "lora_te1_", "lora_te.", "lora_te1."), TEXT_ENCODER),
    PEFT_PREFIX: "",
    "unet.": "",
    "transformer.": "",
    "text_encoder.": TEXT_ENCODER,
    "clip_l.": TEXT_ENCODER,  # OneTrainer's
}
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
# Older namings of diffusers, and kohya's, as they are written today.
_RENAMED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\.processor\.", "."),
        (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
        (r"\.to_out_lora\.", ".to_out.0.lora."),
        (r"\.(?:lora\.|lora_linear_layer\.|lora_)down\.weight$", ".lora_A.weight"),
        (r"\.(?:lora\.|lora_linear_layer\.|lora_)up\.weight$", ".lora_B.weight"),
    )
]
_RENAMED_IN_TEXT = [(re.compile(r"\.to_out\.0\."), ".out_proj."), (re.compile(r"\.to_(q|k|v)\."), r".\1_proj.")]


def read_parts(
    source: str | os.PathLike | Location | LoRA | Mapping[str, torch.Tensor],
    components: Mapping[str, nn.Module],
    **options,
) -> dict[str, LoRA]:
    """A LoRA by component. `components` holds the denoiser first, and what else may have a part in it.

    `source` is a folder, file, packaged model or Hub repository (`options`: `subfolder`, `weight_name`, `revision`,
    ...), a `LoRA` for the denoiser, or the tensors by their keys.
    """
    components = dict(components)
    denoiser = next(iter(components))
    if isinstance(source, LoRA):
        return {denoiser: source}
    if isinstance(source, Mapping):
        return split_parts(source, {}, components, "the LoRA")
    file = read_lora_file(Location.of(source, **options), MOTION_LORA_NAME)
    if all(split_key(key)[1] in ("lora_A.weight", "lora_B.weight") for key in file.tensors):
        if not any(key.startswith(f"{TEXT_ENCODER}.") for key in file.tensors):
            return {denoiser: to_lora(file)}  # with the settings beside it
    return split_parts(file.tensors, file.header, components, str(file.path))


def split_parts(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], components: Mapping[str, nn.Module], source: str
) -> dict[str, LoRA]:
    """The parts for each component, under the names that its modules have."""
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise ValueError(f"{source} is a DoRA; only plain LoRA is supported.")
    names = {component: _known_names(module) for component, module in components.items()}
    found, alphas, seen, strange = defaultdict(dict), defaultdict(dict), defaultdict(dict), []
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
    metadata = json.loads(header.get(METADATA_KEY, "{}"))
    return {
        component: _with_alpha(LoRA(part, source=source), alphas[component], metadata, prefix=component)
        for component, part in found.items()
    }


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
    what = next((name for part, name in _OTHER_KINDS.items() if any(part in key for key in strange)), None)
    return (
        f"{source} does not fit: {len(strange)} of its {count} keys are no part of a LoRA for this {kinds}"
        + (f", such as {strange[0]!r}." if strange else ".")
        + (
            f" It is a {what}, and only plain LoRA is supported."
            if what
            else " It was made for another base model, or is another kind of adapter."
        )
    )


def _of_as_many_dimensions(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """A matrix as a convolution of one pixel, or the other way round; some trainers write all as one of them."""
    if tensor.ndim == 2 and dimensions > 2:
        return tensor.reshape(*tensor.shape, *[1] * (dimensions - 2))
    if dimensions == 2 < tensor.ndim and tensor.shape[2:].numel() == 1:
        return tensor.flatten(1)
    return tensor


def _known_names(network: nn.Module) -> dict[str, str]:
    """Every name a file may give a module of the network, and the one it has."""
    names = {}
    for name, module in network.named_modules():
        if isinstance(base_layer(module), (nn.Linear, nn.Conv2d, nn.Conv3d)):
            # transformers once had CLIP's text model one level deeper.
            for alias in (name, f"text_model.{name}", name.removeprefix("text_model."), original_name(name, network)):
                names.setdefault(alias, name)
                names.setdefault(alias.replace(".", "_"), name)
    return names


def _place(key: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str | None, str]:
    """`lora_unet_mid_block_resnets_0_conv1.lora_down.weight` to (`unet`, `mid_block.resnets.0.conv1`,
    `lora_A.weight`); no module if there is none of that name."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    component = _PREFIXES.get(prefix) or next(iter(names))
    key = key.removeprefix(prefix)
    for pattern, new in _RENAMED + (_RENAMED_IN_TEXT if component == TEXT_ENCODER else []):
        key = pattern.sub(new, key)
    module, half = split_key(key)
    if key.endswith(".alpha"):
        module, half = key.removesuffix(".alpha"), "alpha"
    known = names.get(component, {}).get(module)
    return component, known if half in ("lora_A.weight", "lora_B.weight", "alpha") else None, half


def _with_alpha(lora: LoRA, alphas: dict[str, float], metadata: Mapping[str, Any], prefix: str) -> LoRA:
    """The scale's numerator: kohya's, one for each module, or that of diffusers' metadata, or else the rank."""
    if alphas:
        full = {module: alphas.get(module, float(rank)) for module, rank in lora.ranks().items()}
        lora.alpha = Counter(full.values()).most_common(1)[0][0]
        lora.alpha_pattern = {f"^{module}": alpha for module, alpha in full.items() if alpha != lora.alpha}
        return lora
    config = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    if config.get("use_dora"):
        raise ValueError(f"{lora.source} is a DoRA; only plain LoRA is supported.")
    lora.alpha = config.get("lora_alpha")
    lora.alpha_pattern = dict(config.get("alpha_pattern") or {})
    lora.use_rslora = bool(config.get("use_rslora", False))
    return lora


def write_parts(path: Path, parts: Mapping[str, LoRA]) -> None:
    """One file in diffusers' layout with a part for each component."""
    tensors, header, metadata = {}, {}, {}
    for component, lora in parts.items():
        tensors |= {f"{component}.{key}": tensor.detach().cpu().contiguous() for key, tensor in lora.tensors.items()}
        header = lora_header(lora, component) | header
        metadata |= json.loads(lora_header(lora, component)[METADATA_KEY])
    write_safetensors(path, tensors, header | {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
