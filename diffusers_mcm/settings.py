"""`mcm_config.json`: which base model a LoRA is for, how it is sampled, and how it was made.

Nothing else reads or writes the keys of that file. What a later version adds to it stays in it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from . import hub
from .files import write_text
from .location import Location

CONFIG_NAME = "mcm_config.json"
EXPERTS = HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"  # of a base model that has two, the first to act first
BOUNDARY = 0.875  # the σ where those of Wan 2.2 A14B meet
_WHERE_KNOWN = ("sample", "expert", "boundary")  # keys that are left out where there is nothing to say
DEFAULT_STEPS = 4  # where nothing says in how many steps to sample
# What of a recorded training may be the name of a model or a data set, or a path.
SOURCES = (
    *("pretrained_teacher_model", "pretrained_lora", "discriminator_features", "discriminator_text"),
    *("video_data", "image_data"),
)
# What a reader wants to know of a training: label -> keys.
_TRAINING_ROWS = {
    "teacher": ("pretrained_teacher_model",),
    "expert": ("expert",),
    "begun from the LoRA": ("pretrained_lora",),
    "videos": ("video_data",),
    "images": ("image_data",),
    "frames, height, width": ("num_frames", "height", "width"),
    "frame interval": ("frame_interval",),
    "frames per second of the data": ("data_fps",),
    "motion representation": ("motion",),
    "lambda_real, lambda_adv": ("lambda_real", "lambda_adv"),
    "teacher's guidance, w": ("guidance_min", "guidance_max"),
    "solver steps": ("num_solver_steps",),
    "shift of their grid": ("shift",),
    "weight of the gradient penalty": ("gradient_penalty_weight",),
    "LoRA rank, alpha": ("lora_rank", "lora_alpha"),
    "optimiser steps": ("steps",),
    "total batch": ("total_batch",),
    "learning rate": ("effective_learning_rate",),
    "discriminator's learning rate": ("effective_discriminator_learning_rate",),
    "schedule, warm-up steps": ("lr_scheduler", "lr_warmup_steps"),
    "precision": ("mixed_precision",),
    "decay of the weights' average": ("ema_decay",),
    "seed": ("seed",),
    "hours": ("hours",),
}


@dataclass(frozen=True)
class _Record:
    """An object of JSON; `others` holds the keys that it has no field for."""

    others: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        known = {entry.name for entry in fields(cls)} - {"others"}
        others = {key: value for key, value in content.items() if key not in known}
        return cls(**{key: content[key] for key in known & content.keys()}, others=others)

    def to_dict(self) -> dict[str, Any]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "others"}
        inner = {name: value.to_dict() for name, value in values.items() if isinstance(value, _Record)}
        return {**self.others, **values, **inner}


@dataclass(frozen=True)
class SamplingDefaults(_Record):
    """What a call defaults to; `None` where the base model decides."""

    num_inference_steps: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if value is not None}

    def known(self) -> dict[str, Any]:
        """The values that are known, by `SAMPLING_KEYS`."""
        return {key: value for key in SAMPLING_KEYS if (value := getattr(self, key))}


SAMPLING_KEYS = tuple(entry.name for entry in fields(SamplingDefaults) if entry.name != "others")


@dataclass(frozen=True)
class Sample(_Record):
    """A clip beside the LoRA, and its prompt."""

    file: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Settings(_Record):
    """What `mcm_config.json` says. Paths in it are relative to the folder that it lies in."""

    base_model: str | None = None  # a row of `BASE_MODELS`
    base_model_repository: str | None = None
    base_model_revision: str | None = None
    extra_repositories: Mapping[str, str] = field(default_factory=dict)  # of components that lie elsewhere
    # Of a base model with two experts: for which of them the LoRA is (`EXPERTS`), and the σ where their phases meet.
    expert: str | None = None
    boundary: float | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    training: Mapping[str, Any] = field(default_factory=dict)
    sample: Sample | None = None

    # --- reading and writing -----------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        for name in ("extra_repositories", "sampling", "training", "sample"):
            if not isinstance(content.get(name) or {}, Mapping):
                raise ValueError(f"`{name}` in {CONFIG_NAME} must be an object, not {content[name]!r:.60}.")
        sample = content.get("sample")
        parts = {
            "extra_repositories": content.get("extra_repositories") or {},
            "sampling": SamplingDefaults.from_dict(content.get("sampling") or {}),
            "training": content.get("training") or {},
            "sample": Sample.from_dict(sample) if sample else None,
        }
        if content.get("expert") not in (None, *EXPERTS):
            raise ValueError(f"`expert` in {CONFIG_NAME} must be {' or '.join(EXPERTS)}, not {content['expert']!r}.")
        return super().from_dict({**content, **parts})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads; nothing at all if nothing is known."""
        values = super().to_dict() if self else {}
        return {name: value for name, value in values.items() if name not in _WHERE_KNOWN or value}

    def __bool__(self) -> bool:
        return self != Settings()

    @classmethod
    def read(cls, location: Location) -> Self | None:
        """Those of a folder or repository; `None` if it has none."""
        content = location.json(CONFIG_NAME)
        return None if content is None else cls.from_dict(content)

    def write(self, folder: Path) -> None:
        write_text(folder / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n")

    # --- moving ------------------------------------------------------------------------------------------------------
    def _with_places(self, change: Callable[[str], str]) -> Self:
        """With the names of the base model and its components changed."""
        repository = self.base_model_repository
        return replace(
            self,
            base_model_repository=None if repository is None else change(repository),
            extra_repositories={name: change(place) for name, place in self.extra_repositories.items()},
        )

    def absolute(self, folder: Path | None) -> Self:
        """Settings that were read in `folder`, with absolute paths: `../base` in `/loras/a` becomes `/loras/base`."""
        if folder is None:
            return self
        return self._with_places(lambda name: os.path.abspath(Path(folder, name)) if hub.is_relative(name) else name)

    def moved(self, old: Path | None, new: Path) -> Self:
        """Settings that were read in `old`, for a file in `new`: `../base` in `/loras/a` is `./base` in `/loras`."""
        return self.absolute(old)._with_places(lambda name: hub.recordable(name, new) if os.path.isabs(name) else name)

    def recorded_in(self, folder: Path) -> Self:
        """For a file in `folder`: ids as they are, paths here relative to it."""
        return self._with_places(lambda name: hub.recordable(name, folder))

    def trained(self, training: Mapping[str, Any], folder: Path) -> Self:
        """For a file in `folder`, with how the LoRA was made: ids as they are, paths and globs relative to it."""
        here = self.recorded_in(folder)
        places = {name: training[name] and hub.recordable(training[name], folder) for name in SOURCES}
        return replace(here, training={**training, **places, "extra_repositories": here.extra_repositories})

    # --- showing -----------------------------------------------------------------------------------------------------
    @property
    def is_local(self) -> bool:
        """Whether some component of the base model is a path, or not known."""
        return any(map(hub.is_local, (self.base_model_repository or ".", *self.extra_repositories.values())))

    def without_training_paths(self) -> Self:
        """Without the paths of the machine that it was trained on."""
        public = {key: hub.public_name(self.training[key]) for key in SOURCES if key in self.training}
        if extra := self.training.get("extra_repositories"):
            public["extra_repositories"] = {name: hub.public_name(place) for name, place in extra.items()}
        return replace(self, training={**self.training, **public})

    def public(self) -> Self:
        """Without the paths of the machine it was made on; `ValueError` if it makes no sense without."""
        for what, name in {"base model": self.base_model_repository, **self.extra_repositories}.items():
            if name is not None and hub.is_local(name):
                where = "`base_model=` here, `--base_model` for `diffusers-mcm push`"
                if what != "base model":
                    where = f"`extra_repositories` in the folder's {CONFIG_NAME}"
                raise ValueError(
                    f"The {what} is recorded as the local folder {name!r}, which nobody else has. Say which repository"
                    f" it is a copy of: {where}."
                )
        return self.without_training_paths()

    @property
    def steps(self) -> int:
        """How many steps to sample in."""
        return self.sampling.num_inference_steps or DEFAULT_STEPS

    @property
    def license(self) -> str | None:
        return self.training.get("license")

    @property
    def image_data(self) -> str | None:
        """The images that lent their appearance, if there were any."""
        return self.training.get("image_data")

    @property
    def prompt(self) -> str | None:
        """The prompt of the sample, or one of the training's."""
        return self.sample.prompt if self.sample else next(iter(self.training.get("validation_prompts") or ()), None)

    def training_rows(self) -> dict[str, list[Any]]:
        """What a card tells of the training: label -> values, as others may see them."""
        return {
            label: [hub.public_name(self.training.get(key)) for key in keys]
            for label, keys in _TRAINING_ROWS.items()
            if any(self.training.get(key) is not None for key in keys)
        }
