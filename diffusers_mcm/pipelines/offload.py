"""Where the weights of a network are that is offloaded, and whether they can be read and changed there.

What diffusers' model offload, or its group offload without a stream, moves to host memory and back can be both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def is_readable(network: nn.Module) -> bool:
    """Whether the network's weights are in memory between two calls, not away one by one or in files."""
    return not is_on_disk(network) and not any(parameter.is_meta for parameter in network.parameters())


def is_on_disk(network: nn.Module) -> bool:
    """Whether diffusers' group offload has weights of the network in files; what is in memory is then no value."""
    return any(group.offload_to_disk_path is not None for group in _groups(network))


def is_changeable(network: nn.Module) -> bool:
    """Whether the network's weights stay as they are changed between two calls; no copy of them is brought instead."""
    return is_readable(network) and all(group.stream is None for group in _groups(network))


def is_in_groups(network: nn.Module) -> bool:
    """Whether diffusers' group offload moves the network's weights, in whatever way."""
    return any(True for _ in _groups(network))


def _groups(network: nn.Module) -> Iterator[Any]:
    """diffusers' groups of modules whose weights are moved together."""
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            yield hook.group
