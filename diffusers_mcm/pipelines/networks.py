"""The networks of a pipeline as a LoRA finds them: what is in them, and what keeps it from acting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..lora import lora_layers
from ..settings import Settings


@dataclass
class AdapterState:
    """The state that peft's layers do not keep; it is on the denoiser, so that pipelines which share it agree."""

    # As given, before the factor alpha / rank; one for each component if the components' differ.
    weights: dict[str, float | dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)  # of each adapter that came with some
    fused: dict[str, float] = field(default_factory=dict)  # what is in the base weights now
    originals: dict[str, torch.Tensor] = field(default_factory=dict)  # of the weights that were fused into
    set_aside: dict[str, nn.Module] = field(default_factory=dict)  # peft's layers, while what they do is fused


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, if it has wrapped it."""
    return getattr(network, "_orig_mod", network)


def fused_projections(network: nn.Module) -> set[str]:
    """The modules whose weights diffusers' `fuse_qkv_projections` has copied, and which are not called since."""
    if getattr(network, "original_attn_processors", None) is None:  # it has never been called: the usual case
        return set()
    fused = set()
    for name, module in network.named_modules():
        if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
            projections = ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v")
            fused |= {f"{name}.{projection}" for projection in projections}
    return fused


def require_called(network: nn.Module, modules: Iterable[str], what: str) -> None:
    """`ValueError` if some of the modules are left out by fused projections, so that a LoRA there does nothing."""
    idle = sorted(fused_projections(network).intersection(modules))
    if idle:
        raise ValueError(
            f"Cannot {what} while the attention's projections are fused (`fuse_qkv_projections`): {len(idle)} of the"
            f" modules with a LoRA are not called, such as {idle[0]!r}. `unfuse_qkv_projections()` first; a LoRA"
            " that is fused (`fuse_lora()`) before they are stays in."
        )


def require_unfused(networks: Iterable[nn.Module]) -> None:
    """`ValueError` if a LoRA is in the weights that another pipeline has fused there."""
    for network in networks:
        fused = next((name for name, layer in lora_layers(network).items() if layer.merged), None)
        if fused is not None:
            raise ValueError(
                f"A LoRA is fused into the weights of this {type(network).__name__} (at {fused!r}) by another"
                " pipeline, which alone can take it out: `unfuse_lora()` there first, and fuse it here."
            )
