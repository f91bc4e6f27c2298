"""The LoRA verbs of a pipeline: load, weigh, switch, fuse, unfuse, unload, save.

They are diffusers' verbs by name and arguments, for a UNet that diffusers puts no LoRA on, for LoRAs on motion
modules, and so that no strength is ever ignored. A LoRA lies on the denoiser and, where it has layers for it, on the
text encoder. The networks keep their stock classes; peft's layers stand in for the modules they adapt. `fuse_lora`
alone writes to base weights, and keeps the originals: to unfuse and to unload restores them bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base_models import BASE_MODELS
from ..location import WEIGHTS_NAME, Location
from ..lora import (
    TEXT_ENCODER,
    LoRA,
    activate,
    check_fits,
    load_lora_into,
    lora_layers,
    read_components,
    take_out,
    write_lora_weights,
)
from ..settings import Settings
from .checks import is_one_value, number
from .fusing import AdapterState, FusingVerbs, Weight, fused_projections, require_unfused, unwrapped

ADAPTERS_FILE = "mcm_adapters.json"
ADAPTERS_FOLDER = "mcm_adapters"


class LoRAVerbs(FusingVerbs):
    """The mixin of `MCMPipeline` that loads, weighs and switches LoRAs."""

    _call_scale = 1.0  # `lora_scale` of the call that is under way

    # --- what is there -----------------------------------------------------------------------------------------------
    @property
    def _adapters(self) -> AdapterState:
        denoiser = unwrapped(self.denoiser)
        if not hasattr(denoiser, "_mcm_adapters"):
            denoiser._mcm_adapters = AdapterState()
        return denoiser._mcm_adapters

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The denoiser, or both experts that share its work, by their components."""
        names = self.base_model.experts.values() or (self.base_model.denoiser_name,)
        return {name: network for name in names if (network := getattr(self, name)) is not None}

    @property
    def _networks(self) -> nn.ModuleDict:
        """The networks a LoRA may lie on, the denoiser first; their modules are named `component.module`."""
        networks = {**self.denoisers, TEXT_ENCODER: getattr(self, TEXT_ENCODER, None)}
        return nn.ModuleDict({name: unwrapped(network) for name, network in networks.items() if network is not None})

    @property
    def _layers(self) -> dict[str, Any]:
        """peft's layers by component and module, whether they are in their places or set aside."""
        return self._adapters.set_aside or lora_layers(self._networks)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters, by component."""
        names = {name: list(getattr(network, "peft_config", {})) for name, network in self._networks.items()}
        return {name: adapters for name, adapters in names.items() if adapters}

    def _networks_of(self, *names: str) -> dict[str, nn.Module]:
        """The networks that one of these adapters lies on, or several."""
        return {key: self._networks[key] for key, loaded in self.get_list_adapters().items() if {*names} & {*loaded}}

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are fused into the weights."""
        return set(self._adapters.fused)

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused into the weights."""
        return len(self._adapters.fused)

    def get_active_adapters(self) -> list[str]:
        """The adapters that act on the next call, fused ones included."""
        if self._adapters.fused:
            return list(self._adapters.fused)
        return self._switched_on if self._lora_enabled else []

    @property
    def adapter_weights(self) -> dict[str, Weight]:
        """The weights of the adapters that act on the next call, as `set_adapters` takes them."""
        return self._weights_of(self.get_active_adapters())

    def _weights_of(self, names: Sequence[str]) -> dict[str, Weight]:
        return {name: self._adapters.weights.get(name, 1.0) for name in names}

    @property
    def _switched_on(self) -> list[str]:
        """The adapters that `set_adapters` chose, whether or not `disable_lora` has been called since."""
        return [name for name in self._loaded if any(name in each.active_adapters for each in self._layers.values())]

    @property
    def _lora_enabled(self) -> bool:
        return not any(layer.disable_adapters for layer in self._layers.values())

    @property
    def _loaded(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))

    def _known(self, names: str | Sequence[str]) -> list[str]:
        if not isinstance(names, (str, Sequence, set)):
            raise TypeError(f"`adapter_names` must be a name or a list of names, got {names!r}.")
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
        require_unfused(self._networks.values())  # one of them may have been exchanged
        self._require_changeable(what)

    # --- loading and unloading ---------------------------------------------------------------------------------------
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | LoRA | Mapping[str, torch.Tensor] | Sequence[Any],
        adapter_name: str | None = None,
        **options,
    ) -> None:
        """Load a LoRA beside those that are active already, at weight one.

        Any LoRA for this base model or the image model it was made from, in the namings of diffusers, PEFT and kohya,
        with or without layers for the text encoder. It fits wholly, or is refused.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a `.safetensors` file, a packaged model, a Hub repository,
                or the tensors by their keys. For two experts (Wan 2.2 A14B) a folder or repository with a file for
                each, or two of all these, `(high, low)`.
            adapter_name: What `set_adapters` will call it.
            options: `subfolder`, `weight_name`, `revision`, `token`, `cache_dir`, ... as in diffusers;
                `load_into_transformer_2`, for a LoRA of one of two experts alone.
        """
        self._require_unfused("load a LoRA")
        own = self.base_model
        loras = self._read_loras(pretrained_model_name_or_path_or_dict, **options)
        for lora in loras.values():
            # The base model whose modules it names; this one, if it names none that only some other has.
            named = (model.name for model in (own, *BASE_MODELS.values()) if model.recognises(lora.modules))
            made_for = lora.settings.base_model or next(named, own.name)
            if made_for != own.name:
                raise ValueError(f"{lora.source} was made for base model {made_for!r}; this is {own.name!r}.")
        self._put_in(loras, adapter_name or self._free_name("default"))

    def _read_loras(self, source: Any, **options: Any) -> dict[str, LoRA]:
        """A LoRA for each network that it has layers for."""
        if isinstance(source, (list, tuple)):
            raise ValueError(
                f"A {self.base_model.name} has one denoiser, and takes one LoRA at a time; got {len(source)} together."
            )
        return read_components(source, self._networks, **options)

    def _free_name(self, stem: str) -> str:
        names = (stem, *(f"{stem}_{i}" for i in range(1, len(self._loaded) + 1)))
        return next(name for name in names if name not in self._loaded)

    def _put_in(self, loras: Mapping[str, LoRA], adapter_name: str) -> None:
        self._require_at_hand("load", loras)
        if adapter_name in self._loaded:  # on whichever component
            raise ValueError(f"An adapter named {adapter_name!r} is loaded already; give another name, or unload it.")
        networks = self._networks
        for component, lora in loras.items():  # all of them before the first is touched
            check_fits(networks[component], lora)
            self._check_differences(component, lora)
            self._require_called("load a LoRA", [f"{component}.{module}" for module in lora.modules])
        with self._or_not_at_all(adapter_name):
            enabled = self._lora_enabled
            active = self._weights_of(self._switched_on)
            for component, lora in loras.items():
                load_lora_into(
                    networks[component], self._keep_differences(component, lora, adapter_name), adapter_name
                )
                if lora.settings:
                    settings = lora.settings.absolute(lora.folder).without_training_paths()
                    self._adapters.settings.setdefault(adapter_name, {})[component] = settings
                if lora.scheduler_config is not None:
                    self._adapters.schedulers.setdefault(adapter_name, lora.scheduler_config)
            self._adapters.weights[adapter_name] = 1.0
            self.set_adapters([*active, adapter_name], [*active.values(), 1.0])
            if not enabled:
                self.disable_lora()

    @contextmanager
    def _or_not_at_all(self, adapter_name: str) -> Iterator[None]:
        """Load an adapter meanwhile; if that is broken off, nothing of it is left, and what acted before acts."""
        if adapter_name in self._loaded:  # which loading refuses
            yield
            return
        enabled, active = self._lora_enabled, self._switched_on
        try:
            yield
        except BaseException:  # a broken scheduler, no memory left, Ctrl-C
            self._take_out([adapter_name], active)
            for layer in self._layers.values():
                layer._disable_adapters = not enabled
            self._apply_differences(anew=True)
            raise

    def _take_out(self, names: Sequence[str], active: Sequence[str]) -> None:
        """Take adapters out of the networks, so that of the others those in `active` act, and forget them."""
        for network in self._networks.values():
            take_out(network, names, active)
        state = self._adapters
        for known in (state.weights, state.settings, state.schedulers, state.differences):
            for name in names:
                known.pop(name, None)

    def unload_lora_weights(self) -> None:
        """Take out every LoRA; the base model is then bit for bit what it was."""
        self._require_changeable("take the LoRA out")
        self.unfuse_lora()
        self._take_out(self._loaded, [])
        self._apply_differences()
        unwrapped(self.denoiser)._mcm_adapters = AdapterState()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take out some of the LoRAs."""
        names = self._known(adapter_names)
        self._require_unfused("delete an adapter")
        if set(names) == set(self._loaded):
            return self.unload_lora_weights()
        self._take_out(names, [name for name in self._switched_on if name not in names])
        self._apply_differences()

    # --- strength ----------------------------------------------------------------------------------------------------
    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Make these adapters, and no others, active at these weights (default: one).

        A weight is a number, or one for each component: `{"unet": 0.8, "text_encoder": 0.5}`, or where two experts
        share the work `{"transformer": 1.0, "transformer_2": 0.8}`. As in diffusers, the scheduler and what a call
        defaults to stay as they are: those of the MCM LoRA that was loaded last.
        """
        names = self._known(adapter_names)
        given: Any = 1.0 if adapter_weights is None else adapter_weights
        each = [given] * len(names) if is_one_value(given) else list(given)
        if len(each) != len(names):
            raise ValueError(f"{len(names)} adapters were named, but {len(each)} weights given.")
        weights = {name: _weight(weight, list(self._networks)) for name, weight in zip(names, each)}
        self._require_unfused("change adapters")
        for layer in self._layers.values():
            activate(layer, names)
        self._adapters.weights.update(weights)
        self._set_scales(weights)

    def disable_lora(self) -> None:
        """Sample with the base model, the LoRAs staying loaded."""
        self._require_unfused("switch the LoRA off")
        for layer in self._layers.values():
            layer._disable_adapters = True
        self._apply_differences()

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._require_changeable("switch the LoRA on")
        for layer in self._layers.values():
            layer._disable_adapters = False
        self._apply_differences()

    @contextmanager
    def _lora_scaled(self, scale: float) -> Iterator[None]:
        """Scale the weights of all active adapters; an error if they, or `scale`, could have no effect."""
        denoisers = map(unwrapped, self.denoisers.values())
        if not self._adapters.fused and any(map(fused_projections, denoisers)) and self.get_active_adapters():
            self._require_called("sample with a LoRA", self._layers)
        if scale == 1.0:
            yield
            return
        self._require_unfused(f"scale the LoRA by {scale}")
        if not self.get_active_adapters():
            raise ValueError(f"A LoRA scale of {scale} was given, but no LoRA is active.")
        with self._scaled(scale):
            yield

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        """Scale the weights of all adapters; those that a callback gives them meanwhile, too."""
        self._call_scale = scale = number("lora_scale", scale)
        before = {layer: dict(layer.scaling) for layer in self._layers.values()}
        for layer, scaling in before.items():
            layer.scaling.update({name: value * scale for name, value in scaling.items()})
        try:
            self._apply_differences()
            yield
        finally:
            self._call_scale = 1.0
            for layer, scaling in before.items():
                layer.scaling.update({name: value for name, value in scaling.items() if name in layer.scaling})
            # of all adapters: one may have come under the name of another meanwhile
            self._set_scales(self._adapters.weights)

    def _set_scales(self, weights: Mapping[str, Weight]) -> None:
        """Have the layers of these adapters act as strongly as their weights and the call's scale say."""
        for path, layer in self._layers.items():
            component = path.partition(".")[0]
            for name, weight in weights.items():
                own = weight.get(component, 1.0) if isinstance(weight, dict) else weight
                layer.set_scale(name, own * self._call_scale)
        self._apply_differences()

    # --- saving ------------------------------------------------------------------------------------------------------
    def _save_adapters(self, folder: Path) -> None:
        """Save every adapter as a LoRA folder of its own, and how they are set."""
        if not self._loaded:
            return
        for name in self._loaded:
            target = folder / ADAPTERS_FOLDER / name
            target.mkdir(parents=True)
            loras = self._extract(name)
            for component, lora in loras.items():
                settings = self._settings(name, component)
                if settings.is_local:  # the folder that the adapter came from is not there to be pointed at; this is
                    here: dict[str, Any] = dict(base_model_repository="../..", base_model_revision=None)
                    settings = dataclasses.replace(settings, **here, extra_repositories={})
                lora.settings, lora.scheduler_config = settings, self._adapters.schedulers.get(name)
            self._write_adapter(target, loras)
        content = json.dumps(self._adapters_state(), indent=2)
        (folder / ADAPTERS_FILE).write_text(content + "\n", encoding="utf-8")

    def _adapters_state(self) -> dict[str, Any]:
        """How the adapters are set, as it is saved with the pipeline."""
        return {
            "adapters": self._weights_of(self._loaded),
            "active": self._switched_on,
            "enabled": self._lora_enabled,
            "fused": self._adapters.fused,
        }

    def _write_adapter(self, folder: Path, loras: Mapping[str, LoRA]) -> None:
        """Write an adapter, by its components, so that `_read_loras` reads it."""
        settings = next(iter(loras.values())).settings
        bare = {component: dataclasses.replace(lora, settings=Settings()) for component, lora in loras.items()}
        write_lora_weights(folder / WEIGHTS_NAME, bare)
        settings.write(folder)

    def _read_adapter(self, place: Location) -> dict[str, LoRA]:
        """Undo `_write_adapter`."""
        return self._read_loras(place)

    def _settings(self, name: str, component: str | None = None) -> Settings:
        """The settings that an adapter came with, on this component or any, and what the pipeline knows of it."""
        known = self._adapters.settings.get(name, {})
        settings = known.get(component or "") or next(iter(known.values()), Settings())
        return dataclasses.replace(settings, base_model=self.base_model.name)

    def _load_adapters(self, location: Location) -> None:
        """Undo `_save_adapters`."""
        state = location.json(ADAPTERS_FILE)
        if state is not None:
            self._restore_adapters(location, state)

    def _restore_adapters(self, location: Location, state: Mapping[str, Any]) -> None:
        """Load the adapters that a pipeline was saved with, and set them as `_adapters_state` says."""
        for name in state["adapters"]:
            place = location.inside(f"{ADAPTERS_FOLDER}/{name}")
            loras = self._read_adapter(place)
            first = next(iter(loras.values()))
            if not first.settings:  # as of a LoRA with layers for the text encoder
                first.settings, first.folder = Settings.read(place) or Settings(), None
            self._put_in(loras, name)
        self.set_adapters(list(state["adapters"]), list(state["adapters"].values()))
        self.set_adapters(state["active"], [state["adapters"][name] for name in state["active"]])
        if state["fused"]:
            self.fuse_lora(list(state["fused"]), lora_scale=next(iter(state["fused"].values())))
        elif not state["enabled"]:
            self.disable_lora()


def _weight(weight: Weight, components: Sequence[str]) -> Weight:
    """Check the weight of an adapter, and return it as it is kept."""
    if not isinstance(weight, Mapping):
        return number("adapter_weights", weight)
    for component, value in weight.items():
        if component not in components or isinstance(value, Mapping):
            raise ValueError(
                f"An adapter's weight must be a number, or one for each of {', '.join(components)}; got {weight!r}."
            )
    return {name: number(f"adapter_weights[{name!r}]", value) for name, value in weight.items()}
