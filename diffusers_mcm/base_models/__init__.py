"""The base models this package can distil and sample: one row each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..lora import LoRA, expert_in_name, for_expert
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
    lora_modules: Iterable[str] | Mapping[str, Sequence[int]] | None = None,
    for_an_expert: bool = False,
) -> BaseModel:
    """The base model that a repository's `model_index.json`, or the modules of a LoRA, belong to.

    The modules are names, or names with the shapes of their matrices A, by which models that differ in nothing but
    their size are told apart. The LoRA of a model's only denoiser and that of one of two experts differ in neither;
    `for_an_expert` tells them apart.
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
    alike = [m for m in BASE_MODELS.values() if m.recognises(names) and bool(m.experts) == for_an_expert]
    if alike:
        shapes = lora_modules if isinstance(lora_modules, Mapping) else {}
        return next((model for model in alike if model.repository_for(shapes)), alike[0])
    raise ValueError(
        f"No supported base model ({', '.join(sorted(BASE_MODELS))}) has the modules this LoRA names, such as"
        f" {names[0] if names else 'none at all'!r}."
    )


def base_model_of(lora: LoRA) -> BaseModel:
    """The base model that a LoRA is for: as its settings say, or else by its modules and their size."""
    name = lora.settings.base_model
    if name:
        return get_base_model(name)
    return infer_base_model(lora_modules=lora.shapes(), for_an_expert=lora.settings.expert is not None)


def may_be_of_an_expert(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether modules of these shapes (of their matrices A) may be those of one of two experts: not if their size is
    that of a model with a single denoiser alone."""
    alike = [model for model in BASE_MODELS.values() if model.recognises(list(shapes))]
    of_that_size = [model for model in alike if model.repository_for(shapes)]
    return any(model.experts for model in of_that_size or alike)


def half_named(lora: LoRA) -> LoRA:
    """The LoRA with the expert that the name of its file says, where it may be for one and says nothing of itself.

    Those of other makers are told by nothing else.
    """
    said = None if lora.settings else expert_in_name(lora.source)
    return for_expert(lora, said) if said and may_be_of_an_expert(lora.shapes()) else lora


def base_repository_of(lora: LoRA) -> str:
    """Where a LoRA's base model is: as its settings or PEFT's say, or else where that of its size usually is."""
    model = base_model_of(lora)
    return lora.base_repository or model.repository_for(lora.shapes()) or model.default_repository


__all__ = [
    "BASE_MODELS",
    "BaseModel",
    "base_model_of",
    "base_repository_of",
    "get_base_model",
    "half_named",
    "infer_base_model",
    "may_be_of_an_expert",
]
