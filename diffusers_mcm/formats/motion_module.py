"""AnimateDiff's motion module with a LoRA merged into it, under the keys of AnimateDiff's own files."""

from __future__ import annotations

import os

import torch

from ..base_models.motion_adapter import load_motion_adapter
from ..lora import LoRA
from .kohya import MOTION, spatial_modules
from .pairs import scales

# diffusers' names of what is inside a motion module, and AnimateDiff's.
_RENAMED = {
    ".norm1.": ".norms.0.",
    ".norm2.": ".norms.1.",
    ".norm3.": ".ff_norm.",
    ".attn1.": ".attention_blocks.0.",
    ".attn2.": ".attention_blocks.1.",
}


def merged_motion_module(lora: LoRA, motion_adapter: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of `motion_adapter` plus what the LoRA adds to them, in the adapter's types."""
    spatial_modules(lora)  # refuses a LoRA of another model
    adapter = load_motion_adapter(motion_adapter).state_dict()
    merge(lora, adapter, os.fspath(motion_adapter))
    return original_keys(adapter)


def merge(lora: LoRA, weights: dict[str, torch.Tensor], name: str) -> None:
    """W + scale·B·A in float32, in place, for each of the LoRA's motion modules."""
    factors = scales(lora)
    for module in (module for module in lora.modules if MOTION in module):
        down, up = (lora.tensors[f"{module}.lora_{half}.weight"].float() for half in "AB")
        weight = weights.get(f"{module}.weight")
        if weight is None or weight.shape != (up.shape[0], down.shape[1]):
            found = "does not have that" if weight is None else f"has there {tuple(weight.shape)}"
            raise ValueError(
                f"{lora.source} does not fit the motion adapter {name}: it changes {module}, a"
                f" {(up.shape[0], down.shape[1])} matrix, and the adapter {found}."
            )
        weights[f"{module}.weight"] = (weight.float() + factors[module] * up @ down).to(weight.dtype)


def original_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys to AnimateDiff's; the positions, which both attentions share, are there once for each."""
    tensors = {}
    for key, tensor in weights.items():
        block, number, inside = _split(key)
        prefix = f"{block}.motion_modules.{number}.temporal_transformer"
        inside = f".{inside}"
        for ours, theirs in _RENAMED.items():
            inside = inside.replace(ours, theirs)
        if inside.endswith(".pos_embed.pe"):
            for i in (0, 1):
                positions = inside.replace(".pos_embed.pe", f".attention_blocks.{i}.pos_encoder.pe")
                tensors[prefix + positions] = tensor.clone()
        else:
            tensors[prefix + inside] = tensor.contiguous()
    return tensors


def _split(key: str) -> tuple[str, str, str]:
    """`down_blocks.0.motion_modules.1.norm.weight` to (`down_blocks.0`, `1`, `norm.weight`)."""
    block, _, rest = key.partition(MOTION)
    number, _, inside = rest.partition(".")
    return block, number, inside
