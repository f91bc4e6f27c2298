"""A LoRA as the readers of kohya files know it: what of it lies in Stable Diffusion's own UNet.

They look up `lora_unet_` and the module's name in diffusers with underscores. Their tables hold the modules of the
image UNet and nothing else: what a LoRA changes in the motion modules goes into a motion module (`motion_module`).
"""

from __future__ import annotations

import json

import torch

from ..lora import LoRA, lora_header
from .pairs import scales

PREFIX = "lora_unet_"
MOTION = ".motion_modules."


def spatial_modules(lora: LoRA) -> list[str]:
    """The modules of the image UNet; `ValueError` for a LoRA of a model that is not one with motion modules added."""
    spatial = [module for module in lora.modules if MOTION not in module]
    if not spatial or len(spatial) == len(lora.modules):
        raise ValueError(
            f"{lora.source} has {len(spatial)} spatial and {len(lora.modules) - len(spatial)} motion modules; this"
            " layout is for an AnimateDiff LoRA, which has both. Its readers know no other video model."
        )
    return spatial


def kohya_tensors(lora: LoRA) -> dict[str, torch.Tensor]:
    """`lora_down (r, in, …)`, `lora_up (out, r, …)` and `alpha ()`, a scale of alpha / r, for each spatial module."""
    ranks, factors = lora.ranks(), scales(lora)
    tensors = {}
    for module in spatial_modules(lora):
        name = PREFIX + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora.tensors[f"{module}.lora_A.weight"].contiguous()
        tensors[f"{name}.lora_up.weight"] = lora.tensors[f"{module}.lora_B.weight"].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(factors[module] * ranks[module]))
    return tensors


def kohya_header(lora: LoRA) -> dict[str, str]:
    """What the interfaces show of a file, and our own settings."""
    config = lora.peft_config()
    header = {key: value for key, value in lora_header(lora, "unet").items() if key.startswith("mcm_")}
    return header | {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": json.dumps(config.r),
        "ss_network_alpha": json.dumps(config.lora_alpha),
        "ss_base_model_version": "sd_v1",
    }
