"""How tools name the tensors of a LoRA, and where each of them keeps the scale.

In memory a key is the module's name in diffusers and `.lora_A.weight` or `.lora_B.weight`; what other tools write is
translated to that. The readers of kohya files look up `lora_unet_` and the module's name with underscores. Their
tables hold the modules of the image UNet and nothing else: what a LoRA changes in the motion modules goes into the
file of a motion module, under the names of AnimateDiff's own code.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..location import json_object
from .adapter import METADATA_KEY, LoRA
from .wan_names import TABLES, original_wan_module, wan_module

# The components that a key may belong to. The second denoiser is Wan 2.2 A14B's, for low noise.
DENOISER, TEXT_ENCODER, SECOND_DENOISER = "", "text_encoder", "transformer_2"
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
COMFYUI_PREFIX = "diffusion_model."
# What the keys of each layout start with, and the component they belong to; a key without prefix is the denoiser's.
PREFIXES = {
    "peft": {PEFT_PREFIX: DENOISER},
    "diffusers": {
        **dict.fromkeys(("unet.", "transformer."), DENOISER),
        **{"transformer_2.": SECOND_DENOISER, "text_encoder.": TEXT_ENCODER},
    },
    "comfyui": {COMFYUI_PREFIX: DENOISER},
    "kohya": {KOHYA_PREFIX: DENOISER, "lora_te_": TEXT_ENCODER, "lora_te1_": TEXT_ENCODER},
    "OneTrainer": {"lora_unet.": DENOISER} | dict.fromkeys(("lora_te.", "lora_te1.", "clip_l."), TEXT_ENCODER),
}
WRITTEN = ("peft", "diffusers", "comfyui", "kohya", "motion-module")  # that are written, and told by `layout_of`
# Older namings of diffusers, and kohya's, as they are written today.
_RENAMED = [
    (r"\.processor\.", "."),
    (r"\.lora_(A|B)\.default\.(weight|bias)$", r".lora_\1.\2"),  # as peft has them in a network
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.(?:lora\.|lora_linear_layer\.|lora_)down\.weight$", ".lora_A.weight"),
    (r"\.(?:lora\.|lora_linear_layer\.|lora_)up\.weight$", ".lora_B.weight"),
]
_RENAMED_IN_TEXT = [(r"\.to_out\.0\.", ".out_proj."), (r"\.to_(q|k|v)\.", r".\1_proj.")]
# What a tensor is to its module, by how its key ends: half of a pair, the scale, or what is added to weight or bias.
_ROLES = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|alpha|diff|diff_b|diff_m)")
SCALED_BIAS = "lora_B.bias"  # peft's `lora_bias`, as diffusers writes a `diff_b`: it is scaled as the pair is
DIFFERENCES = ("diff", "diff_b", SCALED_BIAS)
MOTION = ".motion_modules."
_IN_ANIMATEDIFF = ".temporal_transformer."
# diffusers' names of what is inside a motion module, and AnimateDiff's.
_RENAMED_IN_ANIMATEDIFF = {
    ".norm1.": ".norms.0.",
    ".norm2.": ".norms.1.",
    ".norm3.": ".ff_norm.",
    ".attn1.": ".attention_blocks.0.",
    ".attn2.": ".attention_blocks.1.",
}
# The names of what is inside a resnet of a UNet, and those that Stable Diffusion's first code gave them.
_IN_A_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


# --- keys ------------------------------------------------------------------------------------------------------------
def split_prefix(key: str) -> tuple[str, str, str]:
    """`unet.mid_block.x` to (`diffusers`, `DENOISER`, `mid_block.x`); the layout is empty where there is no prefix."""
    for layout, prefixes in PREFIXES.items():
        for prefix, component in prefixes.items():
            if key.startswith(prefix):
                return layout, component, key.removeprefix(prefix)
    return "", DENOISER, key


def is_denoisers(key: str) -> bool:
    """Whether a key has the prefix that diffusers or PEFT put before the denoiser's, or none."""
    layout, component, _ = split_prefix(key)
    return layout in ("peft", "diffusers", "") and component == DENOISER


def denoiser_key(key: str) -> str:
    """The key without the prefix that diffusers or PEFT put before the denoiser's."""
    return split_prefix(key)[2] if is_denoisers(key) else key


def renamed(key: str, component: str = DENOISER) -> str:
    """`x.to_q_lora.down.weight` as `x.to_q.lora_A.weight`: an older name as diffusers writes it today."""
    for pattern, new in _RENAMED + (_RENAMED_IN_TEXT if component == TEXT_ENCODER else []):
        key = re.sub(pattern, new, key)
    return key


def place_of(key: str) -> tuple[str, str, str]:
    """Component, module and role of a key, in whichever naming it is; the role is empty where it has none of a LoRA's.

    `lora_unet_blocks_0_ffn_0.lora_down.weight` to (`DENOISER`, `blocks.0.ffn.net.0.proj`, `lora_A.weight`).
    """
    _, component, name = split_prefix(key)
    found = _ROLES.fullmatch(renamed(name, component))
    if found is None:
        return component, name, ""
    module, role = found.groups()
    if role == "diff_m":  # what LightX2V calls a difference of the modulation
        module, role = f"{module}.modulation", "diff"
    return component, wan_module(module) or module, role


def is_wan(keys: Iterable[str]) -> bool:
    """Whether some of the keys are of a block of Wan's transformer."""
    modules = (module for component, module, _ in map(place_of, keys) if component in (DENOISER, SECOND_DENOISER))
    return any(module.startswith("blocks.") and wan_module(module) == module for module in modules)


def parameter_of(module: str, role: str) -> str:
    """The parameter that a difference is added to: `x.weight`, `x.bias`, or the table of modulations itself."""
    return module if module.endswith(TABLES) else f"{module}.{'weight' if role == 'diff' else 'bias'}"


def original_name(name: str, network: nn.Module) -> str:
    """`down_blocks.0.attentions.0.proj_in` as Stable Diffusion's first code had it: `input_blocks.1.1.proj_in`.

    Blocks and their layers are counted through there: each of the `layers_per_block` layers is a block, each sampler
    another one, and a layer's resnet, attention and upsampler are numbered inside it. Other modules keep their names.
    """
    layers = getattr(getattr(network, "config", None), "layers_per_block", None)
    match name.split("."):
        case ["mid_block", "resnets" | "attentions" as part, index, _, *_]:
            place = f"middle_block.{2 * int(index) + (part == 'attentions')}"
        case ["down_blocks" | "up_blocks" as stage, block, part, index, _, *_] if isinstance(layers, int):
            first = int(block) * (layers + 1) + (stage == "down_blocks")  # the first of the input blocks is `conv_in`
            if part == "downsamplers":
                return f"input_blocks.{first + layers}.0.op"
            if part == "upsamplers":
                has_attention = hasattr(network.get_submodule(f"{stage}.{block}"), "attentions")
                return f"output_blocks.{first + layers}.{1 + has_attention}.conv"
            if part not in ("resnets", "attentions"):  # motion modules have no such name
                return name
            kind = "input_blocks" if stage == "down_blocks" else "output_blocks"
            place = f"{kind}.{first + int(index)}.{int(part == 'attentions')}"
        case _:
            return name
    inside = name.partition(f".{part}.{index}.")[2]
    return f"{place}.{_IN_A_RESNET.get(inside, inside) if part == 'resnets' else inside}"


def layout_of(keys: Iterable[str]) -> str | None:
    """Which of `WRITTEN` all of these keys are in; `None` if they are in several, or in another."""
    keys = list(keys)
    found = {split_prefix(key)[:2] for key in keys}
    layouts, components = {layout for layout, _ in found}, {component for _, component in found}
    layout = layouts.pop() if len(layouts) == 1 else ""
    if layout in WRITTEN and components <= {DENOISER, SECOND_DENOISER}:
        return layout
    return "motion-module" if keys and all(_IN_ANIMATEDIFF in key for key in keys) else None


# --- what a LoRA's scale is ------------------------------------------------------------------------------------------
def check_no_dora(source: str, keys: Iterable[str] = (), config: Mapping[str, Any] | None = None) -> None:
    """`ValueError` if keys, or peft's configuration, are those of a DoRA."""
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in keys) or (config or {}).get("use_dora"):
        raise ValueError(f"{source} is a DoRA; only plain LoRA is supported.")


def recorded_config(
    header: Mapping[str, str], adapter_config: Mapping[str, Any] | None = None, component: str = DENOISER
) -> dict[str, Any]:
    """`lora_alpha` and what else peft configures: from its file, or else from diffusers' metadata in the header."""
    told = json_object(header.get(METADATA_KEY, "{}"), f"{METADATA_KEY} in the header of a LoRA")
    packed = {split_prefix(key)[1:]: value for key, value in told.items()}
    return dict(adapter_config or {key: value for (owner, key), value in packed.items() if owner == component})


def set_scale(lora: LoRA, config: Mapping[str, Any], alphas: Mapping[str, float] | None = None) -> None:
    """Set the numerator of the scale: kohya's, one for each module, or that of peft's configuration, or the rank."""
    if alphas:
        full = {module: alphas.get(module, float(rank)) for module, rank in lora.ranks().items()}
        lora.alpha = Counter(full.values()).most_common(1)[0][0]
        lora.alpha_pattern = {f"^{module}": alpha for module, alpha in full.items() if alpha != lora.alpha}
        return
    check_no_dora(lora.source, config=config)
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"`alpha_pattern` of {lora.source} must be an object, not {pattern!r:.60}.")
    lora.alpha, lora.alpha_pattern = config.get("lora_alpha"), dict(pattern)
    lora.use_rslora = bool(config.get("use_rslora", False))


def kohya_alpha(header: Mapping[str, str]) -> float | None:
    """The alpha that a kohya file tells of itself, if that is a number."""
    try:
        return float(header["ss_network_alpha"])
    except (KeyError, ValueError):  # "None" or "Dynamic", as other trainers have it
        return None


# --- files of other tools, written -----------------------------------------------------------------------------------
def spatial_modules(lora: LoRA) -> list[str]:
    """The modules of the image UNet; `ValueError` for a LoRA of a model that is not one with motion modules added."""
    spatial = [module for module in lora.modules if MOTION not in module]
    if not spatial or len(spatial) == len(lora.modules):
        raise ValueError(
            f"{lora.source} has {len(spatial)} spatial and {len(lora.modules) - len(spatial)} motion modules; this"
            " layout is for an AnimateDiff LoRA, which has both. Its readers know no other video model"
            + (", but ComfyUI reads Wan's in the layout comfyui." if is_wan(lora.tensors) else ".")
        )
    return spatial


def kohya_tensors(lora: LoRA) -> dict[str, torch.Tensor]:
    """`lora_down (r, in, …)`, `lora_up (out, r, …)` and `alpha ()`, a scale of alpha / r, for each spatial module."""
    ranks, scales = lora.ranks(), lora.scales()
    tensors = {}
    for module in spatial_modules(lora):
        name = KOHYA_PREFIX + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora.tensors[f"{module}.lora_A.weight"].contiguous()
        tensors[f"{name}.lora_up.weight"] = lora.tensors[f"{module}.lora_B.weight"].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(scales[module] * ranks[module]))
    return tensors


def comfyui_tensors(lora: LoRA) -> dict[str, torch.Tensor]:
    """A Wan LoRA as ComfyUI looks its keys up: `lora_down (r, in)`, `lora_up (out, r)` and `alpha ()` for each module
    under the name that Wan's authors gave it, and `diff` and `diff_b`, what is added to a whole weight or bias."""
    names = {module: original_wan_module(module) for module in lora.modules}
    parameters = {parameter: original_parameter(parameter) for parameter in lora.differences}
    unknown = [name for name, theirs in (*names.items(), *parameters.items()) if theirs is None]
    if unknown:
        raise ValueError(
            f"{lora.source} has {len(unknown)} modules that are none of Wan's, such as {unknown[0]!r}; the layout"
            " comfyui is for a Wan LoRA. For AnimateDiff there are kohya and motion-module, which ComfyUI reads."
        )
    ranks, scales = lora.ranks(), lora.scales()
    tensors = {}
    for module, name in names.items():
        tensors[f"{COMFYUI_PREFIX}{name}.lora_down.weight"] = lora.tensors[f"{module}.lora_A.weight"].contiguous()
        tensors[f"{COMFYUI_PREFIX}{name}.lora_up.weight"] = lora.tensors[f"{module}.lora_B.weight"].contiguous()
        tensors[f"{COMFYUI_PREFIX}{name}.alpha"] = torch.tensor(float(scales[module] * ranks[module]))
    for parameter, name in parameters.items():
        tensors[f"{COMFYUI_PREFIX}{name}"] = lora.differences[parameter].contiguous()
    return tensors


def original_parameter(parameter: str) -> str | None:
    """The key, without prefix, of what is added to diffusers' parameter: `blocks.0.self_attn.q.diff_b`."""
    module, _, kind = parameter.rpartition(".")
    table = kind == TABLES
    theirs = original_wan_module(parameter if table else module)
    return theirs and f"{theirs}.{'diff_b' if kind == 'bias' else 'diff'}"


def kohya_header(lora: LoRA) -> dict[str, str]:
    """What the interfaces show of a kohya file."""
    config = lora.peft_config()
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": json.dumps(config.r),
        "ss_network_alpha": json.dumps(config.lora_alpha),
        "ss_base_model_version": "sd_v1",
    }


def animatediff_keys(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A motion adapter under AnimateDiff's keys; the positions, which both attentions share, are there for each.

    `mid_block.motion_modules.0.norm.bias` becomes `mid_block.motion_modules.0.temporal_transformer.norm.bias`.
    """
    tensors = {}
    for key, tensor in weights.items():
        block, _, rest = key.partition(MOTION)
        number, _, inside = rest.partition(".")
        name = f"{block}{MOTION}{number}{_IN_ANIMATEDIFF}{inside}"
        for ours, theirs in _RENAMED_IN_ANIMATEDIFF.items():
            name = name.replace(ours, theirs)
        if name.endswith(".pos_embed.pe"):
            for i in (0, 1):
                tensors[name.replace(".pos_embed.pe", f".attention_blocks.{i}.pos_encoder.pe")] = tensor.clone()
        else:
            tensors[name] = tensor.contiguous()
    return tensors
