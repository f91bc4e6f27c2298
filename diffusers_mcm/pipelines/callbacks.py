"""What a callback at the end of a step is shown, and what becomes of the tensors it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback

from .checks import check_names, has_shape, shown, written

TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class StepCallback(NamedTuple):
    """A user's `callback(pipeline, step, timestep, tensors)` and the names of the tensors that it asks for.

    As in diffusers, `prompt_embeds` are those of the network's batch: under guidance the negative half first, then the
    other. `negative_prompt_embeds` are that first half again, and `None` without guidance.
    """

    function: Callable
    names: Sequence[str]

    def __call__(self, pipeline, step: int, timestep, latents, text: dict, negative: dict | None) -> torch.Tensor:
        """Call it; returns the latents to go on with, and changes the texts in their dictionaries."""
        offered = {"latents": latents}
        if {"prompt_embeds", "negative_prompt_embeds"} & set(self.names):
            halves = (negative, text) if guided(pipeline, negative) and negative is not None else (text,)
            batch = torch.cat([each["prompt_embeds"] for each in halves])
            first = batch.chunk(2)[0] if len(halves) == 2 else None  # shares its memory
            offered |= {"prompt_embeds": batch, "negative_prompt_embeds": first}
        returned = self.function(pipeline, step, timestep, {name: offered[name] for name in self.names})
        if returned is not None and not isinstance(returned, Mapping):
            raise ValueError(f"The callback must return a dictionary of tensors or None, got {shown(returned)}.")
        unknown = [name for name in returned or {} if name not in TENSORS]
        if unknown:
            raise ValueError(f"The callback returned {unknown[0]!r}; valid are {', '.join(TENSORS)}.")
        tensors = offered | dict(returned or {})  # one that returns nothing may have changed them in place
        before, after = offered.get("negative_prompt_embeds"), tensors.get("negative_prompt_embeds")
        if tensors.get("prompt_embeds") is not None:
            _take_prompt_embeds(tensors["prompt_embeds"], before is not None, text, negative)
        if after is not None and after is not before:
            if negative is None:
                raise ValueError(
                    "The callback returned `negative_prompt_embeds`, but the call has no guidance; start it with a"
                    " `guidance_scale` above 1."
                )
            negative["prompt_embeds"] = _like("negative_prompt_embeds", after, negative["prompt_embeds"])
        if len(tensors) > 1:
            for each in filter(None, (text, negative)):  # what goes with them, such as a mask, may be another now
                each.update(pipeline.base_model.embeds_condition(each["prompt_embeds"]))
        return _like("latents", tensors["latents"], latents)


def guided(pipeline, negative: dict | None) -> bool:
    """Whether the next step has guidance; a callback may have switched it off, and on again."""
    if pipeline.do_classifier_free_guidance and negative is None:
        raise ValueError(
            "A callback switched guidance on in a call without; start the call with a `guidance_scale` above 1."
        )
    return pipeline.do_classifier_free_guidance


def step_callback(pipeline, function: Any, names: Any) -> StepCallback | None:
    """The two arguments of a call as one; diffusers' own callbacks bring the names of the tensors they need."""
    if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
        names = list(dict.fromkeys(function.tensor_inputs))
    names = check_names("callback_on_step_end_tensor_inputs", names, pipeline._callback_tensor_inputs)
    if function is None:
        return None
    if not callable(function):
        raise ValueError(f"`callback_on_step_end` must be a function, got {shown(function)}.")
    each = function.callbacks if isinstance(function, MultiPipelineCallbacks) else [function]
    for one in each:
        if isinstance(one, IPAdapterScaleCutoffCallback) and not hasattr(pipeline, "set_ip_adapter_scale"):
            raise ValueError(f"{type(one).__name__} needs an IP-Adapter, which {type(pipeline).__name__} cannot load.")
    return StepCallback(function, names)


def _take_prompt_embeds(given: Any, both: bool, text: dict, negative: dict | None) -> None:
    """Take the texts of the network's batch, or those of its last half; `both` says what was offered."""
    before, rows = text["prompt_embeds"], len(text["prompt_embeds"])
    if both and negative is not None and isinstance(given, torch.Tensor) and len(given) == 2 * rows:
        given = _like("prompt_embeds", given, before, 2 * rows)
        negative["prompt_embeds"], text["prompt_embeds"] = given.chunk(2)
    # diffusers' cutoff of the guidance keeps the last row, as if there were but one video: no text is changed
    elif rows == 1 or not isinstance(given, torch.Tensor) or not torch.equal(given.to(before), before[-1:]):
        text["prompt_embeds"] = _like("prompt_embeds", given, before)


def _like(name: str, given: Any, before: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Give a tensor that a callback returned the type and device of the one it replaces.

    It must have so many rows (by default as many) and, but for the length of texts, the shape of the one before.
    """
    shape: list[int | str] = [rows or len(before), *before.shape[1:]]
    if name != "latents":
        shape[-2] = "length"
    if not isinstance(given, torch.Tensor) or not has_shape(given, shape):
        wanted = f"`{name}` as a tensor of shape {written(shape)}"
        raise ValueError(f"The callback must return {wanted}, got {shown(given)}.")
    return given.to(before.device, before.dtype)
