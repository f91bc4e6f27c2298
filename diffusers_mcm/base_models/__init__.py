"""The base models this package can distil and sample: one row each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..lora import LoRA
from .animatediff import AnimateDiff
from .base import BaseModel
from .modelscope import ModelScope
from .wan import Wan, WanA14B, WanTI2V

BASE_MODELS: dict[str, BaseModel] = {
    model.name: model for model in (ModelScope(), AnimateDiff(), Wan(), WanTI2V(), WanA14B())
}


def get_base_model(name: str) -> BaseModel:
    if name not in BASE_MODELS:
        raise ValueError(f"Unknown base model {name!r}. Known base models: {', '.join(sorted(BASE_MODELS))}.")
    return BASE_MODELS[name]


def infer_base_model(
    *,
    model_index: Mapping[str, Any] | None = None,
    lora_modules: Iterable[str] | None = None,
    for_an_expert: bool = False,
) -> BaseModel:
    """The base model that a repository's `model_index.json`, or the module names of a LoRA, belong to.

    Names do not tell the LoRA of a model's only denoiser from that of one of two experts; `for_an_expert` does.
    """
    if model_index is not None:
        for model in BASE_MODELS.values():
            if model.matches(model_index):
                model.check_repository(model_index)
                return model
        found = {name: value[1] for name, value in model_index.items() if name in ("unet", "transformer")}
        expected = ", ".join(
            f"{m.name} ({m.denoiser_name}: {' or '.join(m.denoiser_classes)})" for m in BASE_MODELS.values()
        )
        raise ValueError(
            f"This is not a text-to-video model that MCM supports: {model_index.get('_class_name')} with denoiser"
            f" {found or 'none'}. Supported: {expected}."
        )
    names = list(lora_modules or ())
    for model in BASE_MODELS.values():
        if model.recognises(names) and bool(model.experts) == for_an_expert:
            return model
    raise ValueError(
        f"No supported base model ({', '.join(sorted(BASE_MODELS))}) has the modules this LoRA names, such as"
        f" {names[0] if names else 'none at all'!r}."
    )


def base_model_of(lora: LoRA) -> BaseModel:
    """The base model that a LoRA is for: as its settings say, or else by the modules it names."""
    name = lora.settings.base_model
    if name:
        return get_base_model(name)
    return infer_base_model(lora_modules=lora.modules, for_an_expert=lora.settings.expert is not None)


__all__ = ["BASE_MODELS", "BaseModel", "base_model_of", "get_base_model", "infer_base_model"]
