"""LoRAs as the world of Stable Diffusion writes them: several namings, and a part for the text encoder.

Whatever the naming, the result is a `LoRA` for each component, and every key is accounted for: it is the place of one
tensor in one of the components, or the file is refused.
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

from .. import hub
from ..lora import (
    METADATA_KEY,
    PEFT_PREFIX,
    LoRA,
    base_layer,
    find_lora_file,
    locate_lora,
    lora_header,
    open_safetensors,
    read_lora,
    split_key,
    write_safetensors,
)

TEXT_ENCODER = "text_encoder"
MOTION_LORA_NAME = "diffusion_pytorch_model.safetensors"  # what AnimateDiff's motion LoRAs on the Hub are called
# What a key starts with, and the component it belongs to ("": the denoiser). kohya first, whose names have no dots.
_PREFIXES = {
    "lora_unet_": "",
    "lora_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
    PEFT_PREFIX: "",
    "unet.": "",
    "transformer.": "",
    "text_encoder.": TEXT_ENCODER,
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
    source: str | os.PathLike | LoRA | Mapping[str, torch.Tensor],
    components: Mapping[str, nn.Module],
    **options,
) -> dict[str, LoRA]:
    """A LoRA by component. `components` holds the denoiser first, and what else may have a part in it.

    `source` is a folder, file, packaged model or Hub repository (`options`: `subfolder`, `weight_name`, `revision`,
    ...), a `LoRA` for the denoiser, or the tensors by their keys.
    """
    denoiser = next(iter(components))
    if isinstance(source, LoRA):
        return {denoiser: source}
    if isinstance(source, Mapping):
        return split_parts(source, {}, components, "the LoRA")
    if not options.get("weight_name") and not os.path.isfile(source):
        where = {key: value for key, value in options.items() if key != "weight_name"}
        if find_lora_file(hub.resolve(source), **where) is None and hub.find_file(source, MOTION_LORA_NAME, **where):
            options["weight_name"] = MOTION_LORA_NAME
    path = locate_lora(source, **options)[1]
    with open_safetensors(path) as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if all(split_key(key)[1] in ("lora_A.weight", "lora_B.weight") for key in tensors):
        if not any(key.startswith(f"{TEXT_ENCODER}.") for key in tensors):
            return {denoiser: read_lora(source, **options)}  # with the settings beside it
    return split_parts(tensors, header, components, str(path))


def split_parts(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], components: Mapping[str, nn.Module], source: str
) -> dict[str, LoRA]:
    """The parts for each component, under the names that its modules have."""
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise ValueError(f"{source} is a DoRA; only plain LoRA is supported.")
    names = {component: _known_names(module) for component, module in components.items()}
    found, alphas, strange = defaultdict(dict), defaultdict(dict), []
    for key, tensor in tensors.items():
        component, module, half = _place(key, names)
        if module is None:
            strange.append(key)
        elif half == "alpha":
            alphas[component][module] = float(tensor)
        else:
            found[component][f"{module}.{half}"] = tensor
    if strange or not found:
        kinds = " or ".join(type(module).__name__ for module in components.values())
        raise ValueError(
            f"{source} does not fit: {len(strange)} of its {len(tensors)} keys are no part of a LoRA for this {kinds}"
            + (f", such as {strange[0]!r}." if strange else ".")
            + " It was made for another base model, or is another kind of adapter."
        )
    metadata = json.loads(header.get(METADATA_KEY, "{}"))
    return {
        component: _with_alpha(LoRA(part, source=source), alphas[component], metadata, prefix=component)
        for component, part in found.items()
    }


def _known_names(network: nn.Module) -> dict[str, str]:
    """Every name a file may give a module of the network, and the one it has."""
    names = {}
    for name, module in network.named_modules():
        if isinstance(base_layer(module), (nn.Linear, nn.Conv2d, nn.Conv3d)):
            # transformers once had CLIP's text model one level deeper.
            for alias in (name, f"text_model.{name}", name.removeprefix("text_model.")):
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
