"""An MCM LoRA in a pipeline: put in, sampled as it was trained to be sampled, and saved as it came."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from diffusers import SchedulerMixin

from ..location import Location
from ..lora import LoRA, LoRAPair, read_loras
from ..settings import SAMPLING_KEYS, SamplingDefaults
from .adapters import LoRAVerbs
from .sole_use import is_sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Brought:
    """What the MCM LoRA that was loaded last has brought, and what it came in the place of.

    Attributes:
        name: the adapter.
        scheduler_config: of its scheduler; `None` if it came without.
        defaults: what it says that a call defaults to, by `SAMPLING_KEYS`.
        own_scheduler: the pipeline's without it.
        own_defaults: likewise.
    """

    name: str
    scheduler_config: dict[str, Any] | None
    defaults: dict[str, Any]
    own_scheduler: SchedulerMixin
    own_defaults: dict[str, Any]


class MCMLoRAVerbs(LoRAVerbs):
    """The mixin of `MCMPipeline` that knows with which scheduler, and in how many steps, a LoRA is sampled."""

    _brought: Brought | None = None

    def load_mcm_lora(
        self,
        pretrained_model_name_or_path: str | os.PathLike | LoRA | LoRAPair | Sequence[str | os.PathLike],
        adapter_name: str | None = None,
        **options,
    ) -> None:
        """Load an MCM LoRA, make it the only active adapter, and sample as it was trained to be sampled.

        What it does not say is as it would be without any LoRA: nothing is left of one that was loaded before, but a
        scheduler or a default that was set by hand since stays.

        Of a base model with two experts it is the pair of theirs: a folder or repository with both, or both together.
        `options` are those of [`~MCMPipeline.load_lora_weights`]. Another LoRA that is loaded so stays loaded; it is
        saved and published with the scheduler and the defaults of a call that it came with.
        """
        if is_sampling(self):
            raise ValueError(
                "`load_mcm_lora` brings a scheduler of its own, which a call that is under way cannot change to; in a"
                " callback use `load_lora_weights` and `set_adapters`."
            )
        given = pretrained_model_name_or_path
        read = given if isinstance(given, LoRA) else read_loras(given, **options)
        adapter_name = adapter_name or self._free_name("mcm")
        lora, *_ = [read] if isinstance(read, LoRA) else read
        own_scheduler, own_defaults = self._own_sampling()
        defaults = lora.settings.sampling.known()
        with self._or_not_at_all(adapter_name):
            self.load_lora_weights(read, adapter_name)
            self.set_adapters(adapter_name)
            self.enable_lora()
            scheduler = self._scheduler_of(lora.scheduler_config)
        self._note_sampling()
        self.scheduler = scheduler
        self._brought = Brought(adapter_name, lora.scheduler_config, defaults, own_scheduler, own_defaults)
        self.register_to_config(**own_defaults | defaults)

    def _sample_as_named(self, options: Mapping[str, Any]) -> None:
        """Sample with what of `from_pretrained`'s options says how, whatever has been loaded since."""
        self.register_to_config(**{key: value for key in SAMPLING_KEYS if (value := options.get(key)) is not None})
        if isinstance(named := options.get("scheduler"), self.base_model.scheduler_class):
            self.scheduler = named

    def _own_sampling(self) -> tuple[SchedulerMixin, dict[str, Any]]:
        """The few-step scheduler, and what a call defaults to, without the MCM LoRA that was loaded last.

        What is not as that LoRA brought it has been set by hand, and counts as the pipeline's own.
        """
        scheduler, defaults = self.few_step_scheduler(), self._defaults
        if (brought := self._brought) is None:
            return scheduler, defaults
        if brought.scheduler_config is not None:
            its = self.base_model.scheduler_class.from_config(brought.scheduler_config)
            if _public(its.config) == _public(scheduler.config):
                scheduler = brought.own_scheduler
        for name, value in brought.defaults.items():
            if defaults[name] == value:
                defaults[name] = brought.own_defaults[name]
        return scheduler, defaults

    @property
    def _defaults(self) -> dict[str, Any]:
        """What a call defaults to, where the configuration says it."""
        return {key: self.config.get(key) for key in SAMPLING_KEYS}

    def _make_way(self, saved: Location) -> None:
        """Have the LoRAs that a pipeline was saved with be in no weights, for another one is about to be loaded."""
        if acting := self.get_active_adapters():
            self.unfuse_lora()
            logger.warning(
                "%s was saved with a LoRA (%s), which does not act beside the one that is given; `set_adapters` has"
                " both act.",
                saved,
                ", ".join(acting),
            )

    def _note_sampling(self) -> None:
        """Keep what the LoRA that was loaded last came without, and has been sampled with, before that changes."""
        if self._brought is None or (name := self._brought.name) not in self._loaded:
            return
        if (config := self._scheduler_config(name)) is not None:
            self._adapters.schedulers[name] = config
        settings = self._adapters.settings.setdefault(name, {})
        for component in self._networks_of(name):
            settings[component] = replace(self._settings(name, component), sampling=self._sampling_of(name, component))

    def _scheduler_config(self, name: str) -> dict[str, Any] | None:
        """The configuration of the scheduler that an adapter came with, or else of the pipeline's; `None` where that
        is of another class than the base model's students are sampled with."""
        own = self._adapters.schedulers.get(name)
        if own is None and isinstance(self.scheduler, self.base_model.scheduler_class):
            own = dict(self.scheduler.config)
        return own

    def _sampling_of(self, name: str, component: str | None = None) -> SamplingDefaults:
        """What a call defaults to for an adapter, by its settings or else now."""
        sampling = self._settings(name, component).sampling
        if sampling == SamplingDefaults():
            sampling = SamplingDefaults.from_dict({key: self.sampling_default(key) for key in SAMPLING_KEYS})
        return sampling

    @contextmanager
    def _sampled_as(self, name: str) -> Iterator[None]:
        """Sample as an adapter is when it has been saved and is loaded alone."""
        scheduler, defaults = self.scheduler, self._defaults
        _, own_defaults = self._own_sampling()
        config, sampling = self._scheduler_config(name), self._sampling_of(name)
        self.scheduler = self._scheduler_of(config)
        self.register_to_config(**own_defaults | sampling.known())
        try:
            yield
        finally:
            self.scheduler = scheduler
            self.register_to_config(**defaults)

    def _scheduler_of(self, config: dict[str, Any] | None) -> SchedulerMixin:
        """The scheduler that a LoRA names, or else the pipeline's own, which samples in few steps."""
        if config is None:
            return self._own_sampling()[0]
        return self.base_model.scheduler_class.from_config(config)

    # --- saved with the pipeline -------------------------------------------------------------------------------------
    def _adapters_state(self) -> dict[str, Any]:
        state = super()._adapters_state()
        if self._brought is not None:
            scheduler, defaults = self._own_sampling()
            config = _public(json.loads(scheduler.to_json_string()))
            state["mcm_lora"] = {"adapter": self._brought.name, "own_scheduler": config, "own_defaults": defaults}
        return state

    def _restore_adapters(self, location: Location, state: Mapping[str, Any]) -> None:
        super()._restore_adapters(location, state)
        if (saved := state.get("mcm_lora")) is not None:
            name, own_scheduler = saved["adapter"], self._scheduler_of(saved["own_scheduler"])
            config, defaults = self._adapters.schedulers.get(name), self._settings(name).sampling.known()
            self._brought = Brought(name, config, defaults, own_scheduler, saved["own_defaults"])


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers notes of where it is from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
