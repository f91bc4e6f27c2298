"""The tensors of a LoRA file, each in its place: every key is accounted for, or the file is refused."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from .adapter import LoRA
from .layouts import (
    DENOISER,
    DIFFERENCES,
    SCALED_BIAS,
    SECOND_DENOISER,
    TEXT_ENCODER,
    check_no_dora,
    parameter_of,
    place_of,
    recorded_config,
    set_scale,
    split_prefix,
)
from .wan_names import wan_module

PAIR = ("lora_A.weight", "lora_B.weight")
# What is in the keys of adapters that are no LoRA.
_OTHER_KINDS = {
    **dict.fromkeys((".hada_w1", ".hada_w2"), "LoHa"),
    **dict.fromkeys((".lokr_w1", ".lokr_w2"), "LoKr"),
    ".lora_mid.": "LoCon with a third matrix (lora_mid)",
    ".oft_": "OFT",
    ".on_input": "IA3",
}
_DIFFERENCE = re.compile(r"\.diff(_\w+)?$")

# Component, module and role of a key; no module if it has no place.
Place = Callable[[str, torch.Tensor], tuple[str, str | None, str]]


def sort_tensors(
    tensors: Mapping[str, torch.Tensor],
    place: Place,
    source: str,
    config: Callable[[str], Mapping],
) -> tuple[dict[str, LoRA], list[str]]:
    """Sort a file's tensors into a LoRA for each component; the keys without a place are returned beside them.

    `config` tells what peft configures of a component, for one whose scale is not told by tensors. `ValueError` for
    a place that is filled twice, and for half a pair where an alpha belongs to it.
    """
    loras: dict[str, LoRA] = defaultdict(lambda: LoRA({}, source=source))
    alphas: dict[str, dict[str, float]] = defaultdict(dict)
    seen: dict[tuple[str, str], str] = {}
    scaled: list[tuple[str, str]] = []
    strange = []
    for key, tensor in tensors.items():
        component, module, role = place(key, tensor)
        if module is None or (role == "alpha" and not (tensor.numel() == 1 and math.isfinite(tensor))):
            strange.append(key)
            continue
        filled = parameter_of(module, role) if role in DIFFERENCES else f"{module}.{role}"
        if (other := seen.setdefault((component, filled), key)) != key:
            what = component or "denoiser"
            raise ValueError(f"{source} holds {filled} of the {what} twice, as {other!r} and as {key!r}.")
        if role == "alpha":
            alphas[component][module] = float(tensor)
        elif role in DIFFERENCES:
            loras[component].differences[filled] = tensor
            scaled += [(component, module)] * (role == SCALED_BIAS)
        else:
            loras[component].tensors[filled] = tensor
    for component, lora in loras.items():
        _check_once(lora, seen, component)
        # ComfyUI passes over the alpha of a difference; one of nothing at all tells that a pair is missing
        known = {*lora.modules, *(name.rpartition(".")[0] for name in lora.differences), *lora.differences}
        strange += [seen[component, f"{module}.alpha"] for module in alphas[component] if module not in known]
        if alphas[component]:
            lora.check_pairs()
        set_scale(lora, config(component), alphas[component])
        _scale_biases(lora, [module for of, module in scaled if of == component])
    strange += [seen[name, f"{module}.alpha"] for name in alphas.keys() - loras.keys() for module in alphas[name]]
    return dict(loras), strange


def _scale_biases(lora: LoRA, modules: list[str]) -> None:
    """Scale what is added to the biases of these modules as their pairs are."""
    scales = lora.scales() if modules else {}
    for module in modules:
        if (scale := scales.get(module, 1.0)) != 1.0:
            bias = lora.differences[f"{module}.bias"]
            lora.differences[f"{module}.bias"] = scale * bias.to(torch.promote_types(bias.dtype, torch.float32))


def _check_once(lora: LoRA, seen: Mapping[tuple[str, str], str], component: str) -> None:
    """`ValueError` if a weight is changed by a pair and by a difference, of which readers take one or the other."""
    twice = next((module for module in lora.modules if f"{module}.weight" in lora.differences), None)
    if twice is not None:
        pair = next(seen[component, f"{twice}.{half}"] for half in PAIR if (component, f"{twice}.{half}") in seen)
        raise ValueError(
            f"{lora.source} changes the weight of {twice} twice, by a LoRA ({pair!r}) and by a difference"
            f" ({seen[component, f'{twice}.weight']!r}), and programs differ in which of them they take. Remove one."
        )


# --- Wan's, whose names alone tell where they belong -----------------------------------------------------------------
def sort_wan(
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, str],
    source: str,
    adapter_config: Mapping | None = None,
) -> dict[str, LoRA]:
    """The LoRAs of a file for Wan by component (`DENOISER`, and `SECOND_DENOISER` of a pair), in any naming.

    `ValueError` that names the keys that are no part of one.
    """
    check_no_dora(source, tensors)
    loras, strange = sort_tensors(
        tensors, _in_wan, source, lambda component: recorded_config(header, adapter_config, component)
    )
    if strange or not any(lora.tensors for lora in loras.values()):
        reason = why_strange(strange) or _changes_more(strange) or "is for another model than Wan, or is incomplete"
        raise ValueError(
            f"{source} does not fit Wan's transformer: {len(strange)} of its {len(tensors)} keys are no part of a LoRA"
            f" for that{f', such as {strange[0]!r}' if strange else ', and no pair of matrices is there'}. It"
            f" {reason}."
        )
    return loras


def _in_wan(key: str, tensor: torch.Tensor) -> tuple[str, str | None, str]:
    component, module, role = place_of(key)
    is_part = role and component in (DENOISER, SECOND_DENOISER) and wan_module(module) == module
    return component, module if is_part else None, role


def why_strange(keys: list[str]) -> str | None:
    """What other kind of adapter a file is, as far as the keys tell that have no place."""
    kind = next((kind for part, kind in _OTHER_KINDS.items() if any(part in key for key in keys)), None)
    if kind is None and any(map(_DIFFERENCE.search, keys)):
        kind = "difference of whole weights"
    return kind and f"is a {kind}, and only plain LoRA is supported"


def _changes_more(keys: list[str]) -> str | None:
    """Which other network of a pipeline a file changes, as far as the keys tell that have no place."""
    if any(key.startswith(("vae.", "lora_vae", "first_stage_model.")) for key in keys):
        return "changes the autoencoder too, which stays as it is here; remove those keys"
    if any(split_prefix(key)[1] == TEXT_ENCODER or key.startswith("text_encoders.") for key in keys):
        return "changes the text encoder too, which stays as it is here; remove those keys"
    return None
