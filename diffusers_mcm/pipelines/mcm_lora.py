"""An MCM LoRA in a pipeline: put in, sampled as it was trained to be sampled, and saved as it came."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import SchedulerMixin

from ..lora import LoRA, LoRAPair, read_loras
from ..settings import SAMPLING_KEYS, SamplingDefaults
from .adapters import LoRAVerbs
from .sole_use import is_sampling


class MCMLoRAVerbs(LoRAVerbs):
    """The mixin of `MCMPipeline` that knows with which scheduler, and in how many steps, a LoRA is sampled."""

    _mcm_lora: str | None = None  # the adapter that was loaded last as an MCM LoRA

    def load_mcm_lora(
        self,
        pretrained_model_name_or_path: str | os.PathLike | LoRA | LoRAPair | Sequence[str | os.PathLike],
        adapter_name: str | None = None,
        **options,
    ) -> None:
        """Load an MCM LoRA, make it the only active adapter, and sample as it was trained to be sampled.

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
        self._note_sampling()
        self.load_lora_weights(read, adapter_name)
        self.set_adapters(adapter_name)
        self.enable_lora()
        self.scheduler = self._scheduler_of(lora.scheduler_config)
        self.register_to_config(**lora.settings.sampling.known())
        self._mcm_lora = adapter_name

    def _note_sampling(self) -> None:
        """Keep what the LoRA that was loaded last came without, and has been sampled with, before that changes."""
        if (name := self._mcm_lora) not in self._loaded:
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
        scheduler, defaults = self.scheduler, {key: self.config.get(key) for key in SAMPLING_KEYS}
        config, sampling = self._scheduler_config(name), self._sampling_of(name)
        self.scheduler = self._scheduler_of(config)
        self.register_to_config(**dict.fromkeys(SAMPLING_KEYS) | sampling.known())
        try:
            yield
        finally:
            self.scheduler = scheduler
            self.register_to_config(**defaults)

    def _scheduler_of(self, config: dict[str, Any] | None) -> SchedulerMixin:
        """The scheduler that a LoRA names, or else one that samples in few steps."""
        return self.few_step_scheduler() if config is None else self.base_model.scheduler_class.from_config(config)
