"""Saving a pipeline or its LoRA, and putting either on the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import hub
from ..cards import CARD_NAME, DEFAULT_PROMPT, is_local
from ..files import whole_files, write_text
from ..lora import write_lora_folder
from . import loading
from .adapters import ADAPTERS_FILE, ADAPTERS_FOLDER, LoRAVerbs

_PUSH_OPTIONS = ("repo_id", "private", "token", "commit_message", "create_pr", "overwrite_card")


class HubVerbs(LoRAVerbs):
    """The mixin of `MCMPipeline` that saves and publishes what the LoRA verbs have loaded."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save the clean base model, and every LoRA beside it; `from_pretrained` restores both to the bit.

        The arguments are those of diffusers' `save_pretrained`. With `push_to_hub` the whole of it, base model
        included, is published as `repo_id` in one commit; [`~MCMPipeline.push_to_hub`] publishes the LoRA alone. A
        card that was edited on the Hub stays, unless `overwrite_card=True`.
        """
        folder = Path(save_directory)
        hub_options = {key: kwargs.pop(key) for key in _PUSH_OPTIONS if key in kwargs}
        with whole_files(folder, "model_index.json", stale=(ADAPTERS_FILE, ADAPTERS_FOLDER)) as temporary:
            with self._clean_networks():
                super().save_pretrained(str(temporary), **kwargs)
            loading.forget_local_paths(temporary)
            self._save_adapters(temporary)
        if push_to_hub:
            self._push_pipeline(folder, **hub_options)

    def _push_pipeline(
        self,
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        overwrite_card: bool = False,
    ) -> str:
        from ..publish import open_repository, pipeline_card, publish_folder

        repository = open_repository(repo_id or folder.resolve().name, private=private, token=token)
        card = folder / CARD_NAME
        if not card.is_file() and hub.find_file(repository, CARD_NAME, token=token) is None:
            write_text(card, pipeline_card(repository))
        message = commit_message or f"Upload {type(self).__name__}"
        options = dict(create_pr=create_pr, overwrite_card=overwrite_card)
        return publish_folder(folder, repository, token=token, commit_message=message, **options)

    def save_mcm_lora(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Save one LoRA as a folder that `load_mcm_lora` and `from_pretrained` read: weights, settings, scheduler.

        Args:
            save_directory: Made if it is not there.
            adapter_name: Which LoRA; needed if several are loaded.
        """
        name = self._one_adapter(adapter_name)
        if list(parts := self._parts(name)) != [self.base_model.denoiser_name]:
            raise ValueError(f"{name!r} lies on {', '.join(parts)}; an MCM LoRA lies on the denoiser alone.")
        folder = Path(save_directory)
        lora = self._extract(name)[self.base_model.denoiser_name]
        sampling = {key: self.sampling_default(key) for key in loading.SAMPLING_KEYS}
        lora.config = {
            "sampling": sampling,
            **self._adapters.configs.get(name, {}),
            "base_model": self.base_model.name,
        }
        if is_local(lora.config.get("base_model_repository") or "."):  # relative to where the LoRA was read
            origin = self.config.get("_name_or_path") or self.base_model.default_repository
            lora.config["base_model_repository"] = hub.recordable(origin, folder)
        extra = lora.config.get("extra_repositories") or {}
        lora.config["extra_repositories"] = {part: hub.recordable(place, folder) for part, place in extra.items()}
        lora.config.pop("sample", None)  # that clip is not here
        if isinstance(self.scheduler, self.base_model.scheduler_class):
            lora.scheduler_config = dict(self.scheduler.config)
        write_lora_folder(folder, lora, self.base_model.denoiser_name)

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
        """
        Publish the MCM LoRA: weights, settings, scheduler, model card and a sample clip, in one commit.

        The base model stays where it is; `save_pretrained(folder, push_to_hub=True, repo_id=...)` publishes that too.

        Args:
            repo_id (`str`):
                `"owner/name"`, or a name in your own namespace. Created if it is not there.
            commit_message (`str`, *optional*), create_pr (`bool`, defaults to `False`), revision (`str`, *optional*):
                As in diffusers; the branch `revision` is created if it is not there.
            private (`bool`, *optional*):
                Visibility of a new repository; by default the account's. That of an existing one never changes.
            token (`str`, *optional*):
                Default: `HF_TOKEN`, or that of `hf auth login`.
            adapter_name (`str`, *optional*):
                Which LoRA; needed if several are loaded.
            prompt (`str`, *optional*):
                Of the sample clip, which is made with this LoRA alone and seed 0.
            base_model (`str`, *optional*):
                Repository of the base model, if the LoRA was trained with a copy on this machine.
            overwrite_card (`bool`, defaults to `False`):
                Put a new card in the place of one that was edited on the Hub, which otherwise stays.

        Returns:
            `str`: The address of the commit, or of the pull request.
        """
        from ..publish import check_repository_name, publish_lora, record_sample

        check_repository_name(repo_id)
        name = self._one_adapter(adapter_name)
        recorded = (self._adapters.configs.get(name, {}).get("sample") or {}).get("prompt")
        prompt = prompt or recorded or DEFAULT_PROMPT
        with self._alone(name):
            video = self(prompt, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_mcm_lora(folder, name)
            record_sample(folder, np.asarray(video), prompt, self.sampling_default("fps"))
            options: dict[str, Any] = dict(private=private, token=token, commit_message=commit_message)
            options |= dict(revision=revision, create_pr=create_pr, base_model=base_model)
            options["overwrite_card"] = overwrite_card
            return publish_lora(folder, repo_id, **options)

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
        active = {each: self._adapters.weights.get(each, 1.0) for each in self._switched_on}
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
