"""The LoRA verbs of a pipeline: load, weigh, switch, fuse, unfuse, unload, save.

The denoiser keeps its stock class; peft's layers stand in for the modules they adapt. Its base weights are never
written to, except by `fuse_lora`, which sets the originals aside: `unfuse_lora` and `unload_lora_weights` restore the
base bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import hub
from ..lora import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoRA,
    extract_lora,
    load_lora_into,
    lora_layers,
    read_lora,
    write_lora_weights,
)

ADAPTERS_FILE = "mcm_adapters.json"
ADAPTERS_FOLDER = "mcm_adapters"


@dataclass
class AdapterState:
    """What peft's layers do not remember; kept on the denoiser, so that pipelines which share it agree."""

    weights: dict[str, float] = field(default_factory=dict)  # as given, before the factor alpha / rank
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # mcm_config.json of each adapter
    fused: dict[str, float] = field(default_factory=dict)  # what is in the base weights now
    originals: dict[str, torch.Tensor] = field(default_factory=dict)  # of the weights that were fused into


class LoRAVerbs:
    """Mixin of `MCMPipeline`; needs `denoiser` and `base_model`."""

    # --- what is there -----------------------------------------------------------------------------------------------
    @property
    def _adapters(self) -> AdapterState:
        if not hasattr(self.denoiser, "_mcm_adapters"):
            self.denoiser._mcm_adapters = AdapterState()
        return self.denoiser._mcm_adapters

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters, by component."""
        names = list(getattr(self.denoiser, "peft_config", {}))
        return {self.base_model.denoiser_name: names} if names else {}

    def get_active_adapters(self) -> list[str]:
        """The adapters that act on the next call, fused ones included."""
        if self._adapters.fused:
            return list(self._adapters.fused)
        return self._switched_on if self._lora_enabled else []

    @property
    def _switched_on(self) -> list[str]:
        """The adapters that `set_adapters` chose, whether or not `disable_lora` has been called since."""
        chosen = {name for layer in lora_layers(self.denoiser).values() for name in layer.active_adapters}
        return [name for name in self._loaded if name in chosen]

    @property
    def _lora_enabled(self) -> bool:
        return not any(layer.disable_adapters for layer in lora_layers(self.denoiser).values())

    @property
    def _loaded(self) -> list[str]:
        return list(getattr(self.denoiser, "peft_config", {}))

    def _known(self, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            loaded = ", ".join(self._loaded) or "none"
            raise ValueError(f"No adapter named {unknown[0]!r} is loaded. Loaded adapters: {loaded}.")
        if len(set(names)) < len(names):
            raise ValueError(f"An adapter is named twice: {names}.")
        return names

    def _require_unfused(self, what: str) -> None:
        if self._adapters.fused:
            names = ", ".join(self._adapters.fused)
            raise ValueError(f"Cannot {what} while a LoRA ({names}) is fused into the weights; `unfuse_lora()` first.")

    # --- loading and unloading ---------------------------------------------------------------------------------------
    def load_lora_weights(
        self, pretrained_model_name_or_path: str | os.PathLike | LoRA, adapter_name: str | None = None, **options
    ) -> None:
        """Load a LoRA beside those that are active already, at weight one.

        Args:
            pretrained_model_name_or_path: A folder, a `.safetensors` file, a packaged model or a Hub repository.
            adapter_name: What `set_adapters` will call it.
            options: `subfolder`, `weight_name`, `revision`, `token`, `cache_dir`, ... as in diffusers.
        """
        self._require_unfused("load a LoRA")
        lora = _as_lora(pretrained_model_name_or_path, options)
        made_for = lora.config.get("base_model") or self._recognised(lora)
        if made_for != self.base_model.name:
            raise ValueError(f"{lora.source} was made for base model {made_for!r}; this is {self.base_model.name!r}.")
        self._put_in(lora, adapter_name or _free_name("default", self._loaded))

    def _recognised(self, lora: LoRA) -> str:
        """The base model whose modules the LoRA names; this one, if it names none that only some other has."""
        from ..base_models import BASE_MODELS

        candidates = [self.base_model, *BASE_MODELS.values()]
        return next((model.name for model in candidates if model.recognises(lora.modules)), self.base_model.name)

    def _require_at_hand(self, what: str) -> None:
        if any(parameter.is_meta for parameter in self.denoiser.parameters()):
            raise ValueError(f"The denoiser's weights are offloaded; {what} the LoRA before enabling the offload.")

    def _put_in(self, lora: LoRA, adapter_name: str) -> None:
        self._require_at_hand("load")
        enabled = self._lora_enabled
        active = {name: self._adapters.weights.get(name, 1.0) for name in self._switched_on}
        load_lora_into(self.denoiser, lora, adapter_name)
        self._adapters.configs[adapter_name] = lora.config
        self._adapters.weights[adapter_name] = 1.0
        self.set_adapters([*active, adapter_name], [*active.values(), 1.0])
        if not enabled:
            self.disable_lora()

    def unload_lora_weights(self) -> None:
        """Take out every LoRA; the base model is then bit for bit what it was."""
        self.unfuse_lora()
        for name, layer in lora_layers(self.denoiser).items():
            _replace(self.denoiser, name, layer.get_base_layer())
        if self._loaded:
            del self.denoiser.peft_config
        self.denoiser._mcm_adapters = AdapterState()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take out some of the LoRAs."""
        names = self._known(adapter_names)
        self._require_unfused("delete an adapter")
        if set(names) == set(self._loaded):
            return self.unload_lora_weights()
        remaining = [name for name in self._switched_on if name not in names]
        self.set_adapters(remaining, [self._adapters.weights.get(name, 1.0) for name in remaining])
        for name in names:
            for layer in lora_layers(self.denoiser).values():
                layer.delete_adapter(name)
            del self.denoiser.peft_config[name]
            self._adapters.weights.pop(name, None)
            self._adapters.configs.pop(name, None)
        for name, layer in lora_layers(self.denoiser).items():
            if not layer.lora_A:
                _replace(self.denoiser, name, layer.get_base_layer())

    # --- strength ----------------------------------------------------------------------------------------------------
    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters, and no others, active at these weights (default: one)."""
        names = self._known(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, (int, float)):
            adapter_weights = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        if len(adapter_weights) != len(names):
            raise ValueError(f"{len(names)} adapters were named, but {len(adapter_weights)} weights given.")
        self._require_unfused("change adapters")
        for layer in lora_layers(self.denoiser).values():
            trainable = [parameter.requires_grad for parameter in layer.parameters()]
            layer.set_adapter(names)
            for parameter, requires_grad in zip(layer.parameters(), trainable):
                parameter.requires_grad_(requires_grad)
            for name, weight in zip(names, adapter_weights):
                layer.set_scale(name, float(weight))
        self._adapters.weights.update(zip(names, map(float, adapter_weights)))

    def disable_lora(self) -> None:
        """Sample with the base model, the LoRAs staying loaded."""
        self._require_unfused("switch the LoRA off")
        for layer in lora_layers(self.denoiser).values():
            layer._disable_adapters = True

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        for layer in lora_layers(self.denoiser).values():
            layer._disable_adapters = False

    @contextmanager
    def _lora_scaled(self, scale: float) -> Iterator[None]:
        """All active adapters at `scale` times their weights; an error if that could have no effect."""
        if scale == 1.0:
            yield
            return
        self._require_unfused(f"scale the LoRA by {scale}")
        if not self.get_active_adapters():
            raise ValueError(f"A LoRA scale of {scale} was given, but no LoRA is active.")
        with self._weighted(self.get_active_adapters(), scale):
            yield

    @contextmanager
    def _weighted(self, names: Sequence[str], scale: float) -> Iterator[None]:
        """Adapters at `scale` times their weights, active or not."""
        layers = list(lora_layers(self.denoiser).values())
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update({name: layer.scaling[name] * scale for name in names if name in layer.scaling})
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before):
                layer.scaling.update(scaling)

    # --- fusing ------------------------------------------------------------------------------------------------------
    def fuse_lora(self, adapter_names: str | Sequence[str] | None = None, lora_scale: float = 1.0) -> None:
        """Add the active adapters (or those named) to the base weights, which saves their cost at every step.

        The original weights are kept in host memory, so that `unfuse_lora` is exact.
        """
        self._require_unfused("fuse again")
        names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
        if not names or not self._lora_enabled:
            raise ValueError("There is no active LoRA to fuse; is one loaded, and switched on?")
        self._require_at_hand("fuse")
        originals = {}
        with self._weighted(names, lora_scale):
            for module, layer in lora_layers(self.denoiser).items():
                if not any(name in layer.lora_A for name in names):
                    continue
                weight = layer.get_base_layer().weight
                originals[module] = weight.data  # merging safely makes a new tensor and leaves this one alone
                try:
                    layer.merge(safe_merge=True, adapter_names=names)
                except ValueError:
                    self._adapters.originals = originals
                    self._restore()
                    raise
                originals[module] = originals[module].cpu()
        self._adapters.originals = originals
        self._adapters.fused = {name: float(lora_scale) for name in names}

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the base weights are bit for bit what they were, the adapters active as before."""
        self._restore()
        self._adapters.fused = {}

    def _restore(self) -> None:
        layers = lora_layers(self.denoiser)
        for module, original in self._adapters.originals.items():
            weight = layers[module].get_base_layer().weight
            weight.data = original.to(device=weight.device, dtype=weight.dtype)
            layers[module].merged_adapters.clear()
        self._adapters.originals = {}

    # --- saving ------------------------------------------------------------------------------------------------------
    @contextmanager
    def _clean_denoiser(self) -> Iterator[None]:
        """The denoiser as the base model has it, without peft's layers and without what is fused."""
        layers = lora_layers(self.denoiser)
        fused = {}
        for name, layer in layers.items():
            base = layer.get_base_layer()
            if name in self._adapters.originals:
                fused[name] = base.weight.data
                base.weight.data = self._adapters.originals[name]
            _replace(self.denoiser, name, base)
        try:
            yield
        finally:
            for name, layer in layers.items():
                _replace(self.denoiser, name, layer)
                if name in fused:
                    layer.get_base_layer().weight.data = fused[name]

    def _save_adapters(self, folder: Path) -> None:
        """Every adapter as a LoRA folder of its own, and how they are set."""
        (folder / ADAPTERS_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / ADAPTERS_FOLDER, ignore_errors=True)
        if not self._loaded:
            return
        for name in self._loaded:
            target = folder / ADAPTERS_FOLDER / name
            target.mkdir(parents=True)
            lora = extract_lora(self.denoiser, name)
            write_lora_weights(target / WEIGHTS_NAME, lora, self.base_model.denoiser_name)
            config = dict(self._adapters.configs.get(name, {}), base_model=self.base_model.name)
            repository = config.get("base_model_repository")
            if not repository or repository.startswith(".") or os.path.isabs(repository):
                # The folder that the adapter came from is not there to be pointed at; this pipeline is.
                config.update(base_model_repository="../..", base_model_revision=None)
            (target / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        state = {
            "adapters": {name: self._adapters.weights.get(name, 1.0) for name in self._loaded},
            "active": self._switched_on,
            "enabled": self._lora_enabled,
            "fused": self._adapters.fused,
        }
        (folder / ADAPTERS_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _load_adapters(self, source: str, **options) -> None:
        """Undo `_save_adapters`."""
        state = hub.read_json(source, ADAPTERS_FILE, **options)
        if state is None:
            return
        for name in state["adapters"]:
            self._put_in(read_lora(source, **(options | {"subfolder": f"{ADAPTERS_FOLDER}/{name}"})), name)
        for name, weight in state["adapters"].items():
            self.set_adapters(name, weight)
        self.set_adapters(state["active"], [state["adapters"][name] for name in state["active"]])
        if state["fused"]:
            self.fuse_lora(list(state["fused"]), lora_scale=next(iter(state["fused"].values())))
        elif not state["enabled"]:
            self.disable_lora()


def _as_lora(source: str | os.PathLike | LoRA, options: dict[str, Any]) -> LoRA:
    return source if isinstance(source, LoRA) else read_lora(source, **options)


def _free_name(stem: str, taken: Sequence[str]) -> str:
    candidates = (stem if i == 0 else f"{stem}_{i}" for i in range(len(taken) + 1))
    return next(name for name in candidates if name not in taken)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
