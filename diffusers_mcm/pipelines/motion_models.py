"""Motion modules that are a model of their own, to be put in a Stable Diffusion 1.5: AnimateDiff's, and those that
others distilled from them, AnimateLCM (arXiv 2402.00769) and AnimateDiff-Lightning (arXiv 2403.12706).

What a name holds is told by what is in its files. How many steps a module of the last kind takes stands in the name of
its file and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from .. import hub
from ..base_models import get_base_model, infer_base_model
from ..base_models.animatediff import ADAPTER
from ..location import INDEX_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, Location
from ..lora import open_safetensors
from .samplers import OWN, make_scheduler

_ADAPTER_CONFIG = "config.json"
_ADAPTER_WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls an adapter's own file, whole, in parts or as fp16
_STEPS = re.compile(r"(\d+)[-_ ]?steps?(?:_(?:diffusers|comfyui))?\.(?:safetensors|sft)$", re.IGNORECASE)


class Kind(NamedTuple):
    """How a kind of motion modules is sampled, as its makers say.

    Attributes:
        title: what it is called.
        sampler: a name of `make_scheduler`.
        num_inference_steps: the number of steps by default; `None` leaves it to the base model.
        guidance_scale: of classifier-free guidance; 1 is none.
        lora_weight: of the LoRA that comes with the modules.
    """

    title: str
    sampler: str = OWN
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    lora_weight: float = 1.0


PLAIN = Kind("motion modules")
WITH_LORA = Kind("AnimateLCM", "lcm", num_inference_steps=6, guidance_scale=2.0, lora_weight=0.8)
OF_STEPS = Kind("AnimateDiff-Lightning", "euler", num_inference_steps=4)


@dataclass(frozen=True)
class MotionModel:
    """Motion modules that were found.

    Attributes:
        kind: how they are sampled.
        modules: a folder or repository of a `MotionAdapter`, or a file.
        lora: the LoRA for the image model's layers that belongs to them.
        steps: how many steps to sample in; `None` leaves it to the base model.
    """

    kind: Kind
    modules: Location
    lora: Location | None = None
    steps: int | None = None

    @property
    def default_base(self) -> str:
        """The repository of the model that the modules go into, where no other is named."""
        return get_base_model("animatediff").default_repository

    def components(self, base: Location, index: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What to load a base model with, whose `model_index.json` is `index`, beside the options that are given."""
        if given.get(ADAPTER) is not None:
            raise ValueError(f"`{ADAPTER}` goes with a base model, but {self.modules} is itself motion modules.")
        model = infer_base_model(model_index=index)
        if ADAPTER not in model.extra_repositories:
            raise ValueError(
                f"{self.modules} holds motion modules, which go into a Stable Diffusion 1.5 or an AnimateDiff; the"
                f" `base_model` {base} is a {model.name}."
            )
        return {ADAPTER: self.modules, "num_inference_steps": self.steps}

    def set_up(self, pipeline: DiffusionPipeline) -> None:
        """Load the LoRA into a pipeline that has the modules, and have it sample as they were distilled for."""
        if self.lora is not None:
            name = self.kind.title.lower()
            place = self.lora.arguments | {"weight_name": self.lora.weight_name}
            pipeline.load_lora_weights(self.lora.name, name, **place)
            pipeline.set_adapters(name, self.kind.lora_weight)
        pipeline.scheduler = make_scheduler(self.kind.sampler, pipeline)


def find_motion_model(location: Location, steps: int | None = None) -> MotionModel | None:
    """The motion modules in a folder, a repository or a file; `None` where there is something else.

    Args:
        location: What is no pipeline.
        steps: How many steps shall be sampled, by which one of several files is chosen.

    Raises:
        ValueError: if there are modules, but none for so many steps, or several LoRAs beside them.
    """
    if location.is_file:
        return None if hub.is_pickled(location.name) else _in_file(location, steps)
    folder = Path(location.subfolder or ".")
    names = [Path(name).name for name in location.files() if Path(name).parent == folder]
    weights = [name for name in names if hub.is_safetensors(name)]
    if {INDEX_NAME, WEIGHTS_NAME, PEFT_WEIGHTS_NAME} & set(names):
        return None
    if _ADAPTER_CONFIG in names and _is_adapter(location):
        lora = _lora_beside(location, weights)
        kind = PLAIN if lora is None else WITH_LORA
        return MotionModel(kind, replace(location, weight_name=None), lora, steps or kind.num_inference_steps)
    named = location.weight_name or (_of_steps(location, weights, steps) if len(weights) != 1 else weights[0])
    path = location.file(named) if named and not hub.is_pickled(named) else None
    return None if path is None else _in_file(Location(str(path)), steps)


def _is_adapter(location: Location) -> bool:
    return (location.json(_ADAPTER_CONFIG) or {}).get("_class_name") == "MotionAdapter"


def _lora_beside(location: Location, weights: Iterable[str]) -> Location | None:
    """The LoRA in an adapter's folder: the file that is named, or the one that is not the adapter's own."""
    if location.weight_name:
        return location
    others = [name for name in weights if not name.startswith(_ADAPTER_WEIGHTS)]
    if len(others) > 1:
        raise ValueError(
            f"There are several files beside the motion modules in {location}: {', '.join(others)}; name the LoRA with"
            " `weight_name` (--weight_name)."
        )
    return replace(location, weight_name=others[0]) if others else None


def _in_file(location: Location, steps: int | None) -> MotionModel | None:
    """The motion modules in a file of safetensors."""
    with open_safetensors(Path(location.name)) as file:
        keys = list(file.keys())
    if not keys or not all(".motion_modules." in key and "lora" not in key for key in keys):
        return None
    name = os.path.basename(location.name)
    if match := _STEPS.search(name):
        return MotionModel(OF_STEPS, location, steps=_chosen({int(match[1])}, steps, name))
    return MotionModel(PLAIN, location, steps=steps)


def _of_steps(location: Location, names: Iterable[str], steps: int | None) -> str | None:
    """Which of several files is for so many steps, of two namings that in diffusers'; `None` if no name tells."""
    ordered = sorted(names, key=lambda name: "_diffusers." in name)
    found = {int(match[1]): name for name in ordered if (match := _STEPS.search(name))}
    return found[_chosen(found.keys(), steps, str(location))] if found else None


def _chosen(there: Iterable[int], steps: int | None, where: str) -> int:
    """The steps that are asked for, or those that the makers begin with, or else the most; an error for others."""
    known = sorted(there)
    default = OF_STEPS.num_inference_steps if OF_STEPS.num_inference_steps in known else known[-1]
    if (chosen := default if steps is None else steps) not in known:
        raise ValueError(
            f"{where} has motion modules for {', '.join(map(str, known))} steps, none for {chosen}: a module serves"
            " the steps that it was distilled for. Choose one of them (`num_inference_steps`, --steps)."
        )
    return chosen
