"""What the networks of a pipeline hold of LoRAs: beside the base weights, or in them, and how it comes out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..lora import LoRA, activate, compute_dtype, extract_lora, lora_layers
from ..settings import Settings
from .differences import DifferenceVerbs
from .offload import is_on_disk

Weight = float | dict[str, float]  # of an adapter, or one for each component


@dataclass
class AdapterState:
    """The state that peft's layers do not keep; it is on the denoiser, so that pipelines which share it agree."""

    weights: dict[str, Weight] = field(default_factory=dict)  # as given, before the factor alpha / rank
    # Of each adapter that came with some, by the component that they are of.
    settings: dict[str, dict[str, Settings]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)  # configurations, of each that came with one
    fused: dict[str, float] = field(default_factory=dict)  # what is in the base weights now
    originals: dict[str, torch.Tensor] = field(default_factory=dict)  # of the weights that were fused into
    set_aside: dict[str, nn.Module] = field(default_factory=dict)  # peft's layers, while what they do is fused
    mark: object | None = None  # is on every network that something is fused into, and on so many:
    marked: int = 0
    # What adapters add to whole parameters, `component.module.bias`; how strongly they do so now, by adapter and
    # component; and the base model's own values of the parameters that something is added to.
    differences: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    strengths: dict[tuple[str, str], float] = field(default_factory=dict)
    unchanged: dict[str, torch.Tensor] = field(default_factory=dict)


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


def require_unfused(networks: Iterable[nn.Module]) -> None:
    """`ValueError` if a LoRA is in the weights of a pipeline's networks that another pipeline has fused there.

    A pipeline that has all the networks that it was fused into, the denoiser with its state among them, is none.
    """
    networks = [unwrapped(network) for network in networks]
    states = [state for network in networks if (state := vars(network).get("_mcm_adapters")) is not None]
    marks = [vars(network).get("_mcm_fused") for network in networks]
    here = [state.mark for state in states if state.mark is not None and marks.count(state.mark) == state.marked]
    for network, mark in zip(networks, marks):
        fused = next((f" (at {name!r})" for name, layer in lora_layers(network).items() if layer.merged), None)
        if fused is None and (mark is None or mark in here):
            continue
        raise ValueError(
            f"A LoRA is fused into the weights of this {type(network).__name__}{fused or ''} by another pipeline"
            " (or this one, when it had another network beside it), which alone can take it out: `unfuse_lora()` there"
            " first, and fuse it here."
        )


class FusingVerbs(DifferenceVerbs):
    """The half of `LoRAVerbs` that changes base weights."""

    def fuse_lora(self, adapter_names: str | Sequence[str] | None = None, lora_scale: float = 1.0) -> None:
        """Add the active adapters (or those named) to the base weights, which saves their cost at every step.

        The networks are then the base model's own, module by module, as fast as that: peft's layers are set aside. The
        original weights are kept in host memory, so that `unfuse_lora` is exact.
        """
        self._require_unfused("fuse again")
        names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
        if not names or not self._lora_enabled:
            raise ValueError("There is no active LoRA to fuse; is one loaded, and switched on?")
        self._require_at_hand("fuse", self._networks_of(*names))
        if self._call_scale != 1.0:
            raise ValueError("Cannot fuse the LoRA in a call that has a `lora_scale`; fuse it before.")
        self._require_fusible(names)
        originals, fused = self._adapters.originals, {name: float(lora_scale) for name in names}
        try:
            with self._scaled(lora_scale):
                self._apply_differences(fused)
                for module, layer in self._layers.items():
                    if not any(name in layer.lora_A for name in names):
                        activate(layer, [])  # or what is not fused would act here, and only here
                        continue
                    weight = layer.get_base_layer().weight
                    originals[module] = weight.data  # merging safely makes a new tensor and leaves this one alone
                    layer.merge(safe_merge=True, adapter_names=names)
                    originals[module] = originals[module].cpu()
                self._adapters.fused = fused
            self._mark(names)
            self._set_aside()
        except BaseException:  # a broken LoRA, no memory left, Ctrl-C
            self._adapters.fused = {}
            self._restore()
            self._apply_differences(anew=True)
            raise

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the base weights are bit for bit what they were, the adapters active as before."""
        if fused := self._adapters.fused:
            require_unfused(self._networks.values())
            self._require_at_hand("unfuse", self._networks_of(*fused))
            self._require_called("take the LoRA out", self._layers)
        self._adapters.fused = {}
        self._restore()

    def _require_fusible(self, names: Sequence[str]) -> None:
        """`ValueError` where the sum of weight and LoRA would be lost."""
        layers = {module: layer for module, layer in self._layers.items() if set(names) & set(layer.lora_A)}
        self._require_called("fuse a LoRA", layers)
        for module, layer in layers.items():
            if (kind := layer.get_base_layer().weight.dtype).itemsize < 2:
                raise ValueError(
                    f"Cannot fuse a LoRA into weights of {kind}, which would round it away ({module}); leave it"
                    " unfused, or fuse it before `enable_layerwise_casting()`."
                )

    def _require_called(self, what: str, modules: Iterable[str]) -> None:
        """`ValueError` if fused projections leave out some of these modules, so that a LoRA there does nothing."""
        fused = (f"{name}.{each}" for name in self.denoisers for each in fused_projections(self._networks[name]))
        idle = sorted(set(fused).intersection(modules))
        if idle:
            raise ValueError(
                f"Cannot {what} while the attention's projections are fused (`fuse_qkv_projections`): {len(idle)} of"
                f" the modules with a LoRA are not called, such as {idle[0].partition('.')[2]!r}."
                " `unfuse_qkv_projections()` first; a LoRA that is fused (`fuse_lora()`) before they are stays in."
            )

    def _mark(self, names: Iterable[str]) -> None:
        """Have the networks that adapters lie on say that these are fused, to pipelines that share some of them."""
        networks = self._networks_of(*names)
        self._adapters.mark, self._adapters.marked = object(), len(networks)
        for network in networks.values():
            network._mcm_fused = self._adapters.mark

    def _unmark(self) -> None:
        mark, self._adapters.mark = self._adapters.mark, None
        for network in self._networks.values():
            if mark is not None and vars(network).get("_mcm_fused") is mark:
                del network._mcm_fused

    def _restore(self) -> None:
        self._put_back()
        layers, active, originals = self._layers, self._switched_on, self._adapters.originals
        for module, original in originals.items():
            weight = layers[module].get_base_layer().weight
            weight.data = original.to(device=weight.device, dtype=weight.dtype)
            layers[module].merged_adapters.clear()
        for layer in layers.values():
            activate(layer, active)
        self._adapters.originals = {}
        self._apply_differences(anew=bool(originals))
        self._unmark()

    def _set_aside(self) -> None:
        """Put what peft's layers adapt in the places of those layers, which are kept for `_put_back`."""
        networks, layers = self._networks, self._layers
        self._adapters.set_aside = layers  # first, so that none is lost if this is broken off
        for module, layer in layers.items():
            networks.set_submodule(module, layer.get_base_layer())

    def _put_back(self) -> None:
        """Undo `_set_aside`, on the device and in the type in which what they adapt is by now."""
        networks = self._networks
        for module, layer in self._adapters.set_aside.items():
            weight = layer.get_base_layer().weight
            if not weight.is_meta:  # offloaded: the LoRA would be gone
                layer.lora_A.to(device=weight.device, dtype=compute_dtype(layer))
                layer.lora_B.to(device=weight.device, dtype=compute_dtype(layer))
            networks.set_submodule(module, layer)
        self._adapters.set_aside = {}

    def _extract(self, name: str) -> dict[str, LoRA]:
        """Return an adapter by component as it would be read from disk, fused or not."""
        self._require_readable(name)
        fused = bool(self._adapters.set_aside)
        self._put_back()
        try:
            loras = {component: extract_lora(network, name) for component, network in self._networks_of(name).items()}
        finally:
            if fused:
                self._set_aside()
        for component, lora in loras.items():
            lora.differences = self._differences_of(name, component)
        return loras

    def _require_readable(self, name: str) -> None:
        """`ValueError` where an adapter's own tensors are offloaded; while it is fused they are not."""
        if self._adapters.set_aside:
            return
        for component, network in self._networks_of(name).items():
            parts = (part for layer in lora_layers(network).values() for part in (layer.lora_A, layer.lora_B))
            away = any(name in part and part[name].weight.is_meta for part in parts)
            if away or is_on_disk(network):
                raise ValueError(
                    f"The {component}'s weights are offloaded, the LoRA's with them; save it before enabling the"
                    " offload."
                )

    @contextmanager
    def _clean_networks(self) -> Iterator[None]:
        """Make the networks the base model's own meanwhile, without peft's layers and what is fused.

        A module that is exchanged meanwhile carries the LoRA afterwards.
        """
        networks, layers, originals = self._networks, self._layers, self._adapters.originals
        fused = {name: layers[name].get_base_layer().weight.data for name in originals}
        for name, layer in layers.items():
            networks.set_submodule(name, layer.get_base_layer())
            if name in fused:
                layer.get_base_layer().weight.data = originals[name]
        try:
            with self._without_differences():
                yield
        finally:
            for name, layer in layers.items():
                layer.base_layer = networks.get_submodule(name)
                if name in fused:
                    layer.get_base_layer().weight.data = fused[name]
                if not self._adapters.set_aside:
                    networks.set_submodule(name, layer)
