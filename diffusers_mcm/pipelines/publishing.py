"""Saving a pipeline or its LoRA, and putting either on the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..cards import CARD_NAME, DEFAULT_PROMPT
from ..files import atomic_files, write_text
from ..hub import check_repository_name, is_local
from ..location import Location
from ..lora import LoRA, as_pair, write_lora_folder, write_lora_pair
from ..publish import Destination, open_repository, pipeline_card, publish_folder, publish_lora, put_sample
from . import loading
from .adapters import ADAPTERS_FILE, ADAPTERS_FOLDER
from .fusing import require_unfused
from .mcm_lora import MCMLoRAVerbs
from .offload import is_readable


class HubVerbs(MCMLoRAVerbs):
    """The mixin of `MCMPipeline` that saves and publishes what the LoRA verbs have loaded."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save the clean base model, and every LoRA beside it; `from_pretrained` restores both to the bit.

        The arguments are those of diffusers' `save_pretrained`. With `push_to_hub` the whole of it, base model
        included, is published as `repo_id` in one commit; [`~MCMPipeline.push_to_hub`] publishes the LoRA alone. A
        card that was edited on the Hub stays, unless `overwrite_card=True`.
        """
        require_unfused(self._networks.values())
        for name, component in self.components.items():
            if isinstance(component, nn.Module) and not is_readable(component):
                raise ValueError(f"The {name}'s weights are offloaded; save the pipeline before enabling the offload.")
        folder = Path(save_directory)
        options = {entry.name: kwargs.pop(entry.name) for entry in fields(Destination) if entry.name in kwargs}
        with atomic_files(folder, "model_index.json", stale=(ADAPTERS_FILE, ADAPTERS_FOLDER)) as temporary:
            with self._clean_networks():
                super().save_pretrained(str(temporary), **kwargs)
            loading.forget_local_paths(temporary)
            self._save_adapters(temporary)
        if push_to_hub:
            options["repo_id"] = options.get("repo_id") or folder.resolve().name
            self._push_pipeline(folder, Destination(**options))

    def _push_pipeline(self, folder: Path, destination: Destination) -> str:
        repository, card = open_repository(destination), folder / CARD_NAME
        there = Location(repository, options={"token": destination.token}, remote=True)
        if not card.is_file() and there.file(CARD_NAME) is None:
            write_text(card, pipeline_card(repository))
        return publish_folder(folder, replace(destination, repo_id=repository), f"Upload {type(self).__name__}")

    def save_mcm_lora(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Save one LoRA as a folder that `load_mcm_lora` and `from_pretrained` read: weights, settings, scheduler.

        The scheduler is the one that the LoRA came with, whatever the pipeline's is by now; the pipeline's, where it
        came without.

        Where two experts share the work it is two files, `high_noise_model.safetensors` and
        `low_noise_model.safetensors`, each with settings and scheduler in its header.

        Args:
            save_directory: Made if it is not there.
            adapter_name: Which LoRA; needed if several are loaded.
        """
        folder = Path(save_directory)
        name, denoiser = self._one_adapter(adapter_name), self.base_model.denoiser_name
        loras = [self._to_save(name, folder, component) for component in self._lies_on(name)]
        if len(loras) > 1:
            write_lora_pair(folder, dict(zip(self.base_model.experts, loras)), denoiser)
        else:
            write_lora_folder(folder, loras[0], denoiser)

    def _lies_on(self, name: str) -> list[str]:
        """The denoiser, or the experts, that an MCM LoRA lies on; `ValueError` for a LoRA on other networks, too.

        Of two experts the first comes first.
        """
        components = list(self._networks_of(name))
        if not set(components) <= self.denoisers.keys():
            raise ValueError(f"{name!r} lies on {', '.join(components)}; an MCM LoRA lies on the denoiser alone.")
        return components

    def _to_save(self, name: str, folder: Path, component: str) -> LoRA:
        """Return an MCM LoRA as it lies on a component, with settings for a folder."""
        lora, settings = self._extract(name)[component], self._settings(name, component)
        sampling = self._sampling_of(name, component)
        repository = settings.base_model_repository
        if repository is None or is_local(repository):  # relative to where the LoRA was read
            repository = self.config.get("_name_or_path") or self.base_model.default_repository
        # The clip is not here.
        settings = replace(settings, base_model_repository=repository, sampling=sampling, sample=None)
        lora.settings = settings.recorded_in(folder)
        lora.scheduler_config = self._scheduler_config(name)
        return lora

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        revision: str | None = None,
        adapter_name: str | None = None,
        prompt: str | None = None,
        base_model: str | None = None,
        overwrite_card: bool = False,
    ) -> str:
        """Publish the MCM LoRA: weights, settings, scheduler, model card and a sample clip, in one commit.

        Where two experts share the work it is the pair: two files with settings and scheduler in their headers.
        The base model stays where it is; `save_pretrained(folder, push_to_hub=True, repo_id=...)` publishes that too.

        Args:
            repo_id: `"owner/name"`, or a name in your own namespace. Created if it is not there.
            commit_message, create_pr, revision: As in diffusers; the branch `revision` is created if it is not there.
            private: Visibility of a new repository; by default the account's. That of an existing one never changes.
            token: Default: `HF_TOKEN`, or that of `hf auth login`.
            adapter_name: Which LoRA; needed if several are loaded.
            prompt: Of the sample clip, which is made with this LoRA alone, its scheduler and seed 0.
            base_model: Repository of the base model, if the LoRA was trained with a copy on this machine.
            overwrite_card: Put a new card in the place of one that was edited on the Hub, which otherwise stays.

        Returns:
            `str`: The address of the commit, or of the pull request.
        """
        destination = Destination(repo_id, private, token, commit_message, revision, create_pr, overwrite_card)
        check_repository_name(repo_id)
        name = self._one_adapter(adapter_name)
        components = self._lies_on(name)
        if len(components) < len(self.base_model.experts):
            raise ValueError(
                f"{name!r} lies on {components[0]} alone, and is half a pair: a LoRA for each of the two experts is"
                " published together. Load both at once, `load_mcm_lora((high, low))`."
            )
        self._require_readable(name)  # before anything is sampled
        sample = self._settings(name).sample
        prompt = prompt or (sample and sample.prompt) or DEFAULT_PROMPT
        with self._alone(name), self._sampled_as(name):
            video = self(prompt, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
            fps = self.sampling_default("fps")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            loras = [self._to_save(name, folder, component) for component in components]
            sample = put_sample(folder, loras[0].settings, np.asarray(video), prompt, fps).sample
            for lora in loras:
                lora.settings = replace(lora.settings, sample=sample)
            return publish_lora(folder, destination, base_model, as_pair(loras) if len(loras) == 2 else loras[0])

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is not None:
            return self._known(adapter_name)[0]
        if len(self._loaded) != 1:
            loaded = ", ".join(self._loaded) or "none"
            raise ValueError(f"Say which LoRA is meant with `adapter_name`; loaded are: {loaded}.")
        return self._loaded[0]

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Sample with one adapter at weight one, whatever is active otherwise."""
        if self._adapters.fused:
            if list(self._adapters.fused) != [name]:
                raise ValueError("Other LoRAs are fused into the weights; `unfuse_lora()` first.")
            yield
            return
        active = self._weights_of(self._switched_on)
        enabled, weight = self._lora_enabled, self._adapters.weights.get(name, 1.0)
        self.enable_lora()
        self.set_adapters(name)
        try:
            yield
        finally:
            self.set_adapters(name, weight)
            self.set_adapters(list(active), list(active.values()))
            if not enabled:
                self.disable_lora()
