"""The student with its LoRA added to the weights: what it computes, at less cost where the network is small."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapter import DEFAULT_ADAPTER
from .injection import lora_disabled, lora_layers


def fused(denoiser: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Callable[..., Any]:
    """The denoiser with W + s B A as one weight in each layer, instead of a second path beside W.

    Called like the denoiser, with its result up to rounding; gradients reach A and B. The sums are made here, once for
    all calls and for at most one backward pass. They take the memory of the weights they stand for.
    """
    layers = {name: layer for name, layer in lora_layers(denoiser).items() if adapter_name in layer.lora_A}
    sums: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        weight = layer.get_base_layer().weight
        product = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        sums[f"{name}.base_layer.weight"] = torch.add(weight, product, alpha=layer.scaling[adapter_name])

    def call(*args, **kwargs):
        with lora_disabled(denoiser):
            return torch.func.functional_call(denoiser, sums, args, kwargs)

    return call
