"""A LoRA in the base weights instead of beside them, and how it comes out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..lora import LoRA, activate, compute_dtype, extract_lora
from .mixin import PipelineMixin
from .networks import AdapterState, require_called


class FusingVerbs(PipelineMixin):
    """The half of `LoRAVerbs` that changes base weights; the other half is declared here."""

    if TYPE_CHECKING:

        @property
        def _adapters(self) -> AdapterState: ...
        @property
        def _networks(self) -> nn.ModuleDict: ...
        @property
        def _layers(self) -> dict[str, Any]: ...
        @property
        def _switched_on(self) -> list[str]: ...
        @property
        def _lora_enabled(self) -> bool: ...
        def get_active_adapters(self) -> list[str]: ...
        def _networks_of(self, name: str) -> dict[str, nn.Module]: ...
        def _known(self, names: str | Sequence[str]) -> list[str]: ...
        def _require_unfused(self, what: str) -> None: ...
        def _require_at_hand(self, what: str) -> None: ...
        def _weighted(self, names: Sequence[str], scale: float) -> AbstractContextManager: ...

    def fuse_lora(self, adapter_names: str | Sequence[str] | None = None, lora_scale: float = 1.0) -> None:
        """Add the active adapters (or those named) to the base weights, which saves their cost at every step.

        The networks are then the base model's own, module by module, as fast as that: peft's layers are set aside. The
        original weights are kept in host memory, so that `unfuse_lora` is exact.
        """
        self._require_unfused("fuse again")
        names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
        if not names or not self._lora_enabled:
            raise ValueError("There is no active LoRA to fuse; is one loaded, and switched on?")
        self._require_at_hand("fuse")
        self._require_fusible(names)
        originals = self._adapters.originals
        try:
            with self._weighted(names, lora_scale):
                for module, layer in self._layers.items():
                    if not any(name in layer.lora_A for name in names):
                        activate(layer, [])  # or what is not fused would act here, and only here
                        continue
                    weight = layer.get_base_layer().weight
                    originals[module] = weight.data  # merging safely makes a new tensor and leaves this one alone
                    layer.merge(safe_merge=True, adapter_names=names)
                    originals[module] = originals[module].cpu()
        except BaseException:  # a broken LoRA, no memory left, Ctrl-C
            self._restore()
            raise
        self._adapters.fused = {name: float(lora_scale) for name in names}
        self._set_aside()

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the base weights are bit for bit what they were, the adapters active as before."""
        if self._adapters.fused:
            self._require_at_hand("unfuse")
            self._require_called("take the LoRA out", self._layers)
        self._restore()
        self._adapters.fused = {}

    def _require_fusible(self, names: Sequence[str]) -> None:
        """`ValueError` where the sum of weight and LoRA would be lost."""
        layers = {module: layer for module, layer in self._layers.items() if set(names) & set(layer.lora_A)}
        self._require_called("fuse a LoRA", layers)
        narrow = next((module for module, layer in layers.items() if layer.get_base_layer().weight.itemsize < 2), None)
        if narrow is not None:
            kind = layers[narrow].get_base_layer().weight.dtype
            raise ValueError(
                f"Cannot fuse a LoRA into weights of {kind}, which would round it away ({narrow}); leave it unfused,"
                " or fuse it before `enable_layerwise_casting()`."
            )

    def _require_called(self, what: str, modules: Iterable[str]) -> None:
        """`ValueError` if fused projections leave out some of these modules (`component.module`)."""
        name = self.base_model.denoiser_name
        inside = [module.removeprefix(f"{name}.") for module in modules if module.startswith(f"{name}.")]
        require_called(self._networks[name], inside, what)

    def _restore(self) -> None:
        self._put_back()
        layers, active = self._layers, self._switched_on
        for module, original in self._adapters.originals.items():
            weight = layers[module].get_base_layer().weight
            weight.data = original.to(device=weight.device, dtype=weight.dtype)
            layers[module].merged_adapters.clear()
        for layer in layers.values():
            activate(layer, active)
        self._adapters.originals = {}

    def _set_aside(self) -> None:
        """Put what peft's layers adapt in the places of those layers, which are kept for `_put_back`."""
        networks, layers = self._networks, self._layers
        for module, layer in layers.items():
            networks.set_submodule(module, layer.get_base_layer())
        self._adapters.set_aside = layers

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
        fused = bool(self._adapters.set_aside)
        self._put_back()
        try:
            return {component: extract_lora(network, name) for component, network in self._networks_of(name).items()}
        finally:
            if fused:
                self._set_aside()

    @contextmanager
    def _clean_networks(self) -> Iterator[None]:
        """Make the networks the base model's own meanwhile, without peft's layers and what is fused.

        A module that is exchanged meanwhile carries the LoRA afterwards.
        """
        networks, layers = self._networks, self._layers
        fused = {}
        for name, layer in layers.items():
            base = layer.get_base_layer()
            if name in self._adapters.originals:
                fused[name] = base.weight.data
                base.weight.data = self._adapters.originals[name]
            networks.set_submodule(name, base)
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.base_layer = networks.get_submodule(name)
                if name not in self._adapters.set_aside:
                    networks.set_submodule(name, layer)
                if name in fused:
                    layer.get_base_layer().weight.data = fused[name]
