"""A run that goes on from a checkpoint: what must be the same as when it was begun, and what should be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..base_models import BaseModel, get_base_model
from ..flags import FIXED, TOLD
from ..hub import recordable
from .config import TrainingConfig
from .defaults import with_base_defaults


def identity(
    config: TrainingConfig,
    base: BaseModel,
    clip_size: tuple[int, int, int],
    total_batch: int,
    samples_per_coin: int,
    image_text: str,
) -> dict[str, Any]:
    """The settings that must not change when a run is resumed; `image_text` is what --image_text came to."""
    values = config.to_dict()
    decided = {"base_model": base.name, "image_text": image_text}
    if config.coin == "batch":  # which then depends on how the total batch is split
        decided["coin"] = f"batch (of {samples_per_coin})"
    fixed = {name: values[name] for name in config.names(resume=FIXED)}
    return {**fixed, **decided, "total_batch": total_batch, "clip_size": list(clip_size)}


def circumstances(config: TrainingConfig, output_dir: Path) -> dict[str, Any]:
    """What should not change, and is told if it does: data, networks, precision, and the number of steps, where the
    schedule of the rates depends on it; paths relative to the output.

    They may change on purpose: a path, where a folder was moved, the precision on another machine, a run made longer.
    """
    values, sources = config.to_dict(), {*config.names(source=True), "extra_repositories"}
    length = {} if config.lr_scheduler.startswith("constant") else {"max_train_steps": config.max_train_steps}
    return length | {
        name: _as_recorded(values[name], output_dir) if name in sources else values[name]
        for name in config.names(resume=TOLD)
    }


def _as_recorded(source: str | list[str] | None, folder: Path) -> str | list[str] | None:
    """A source as `recordable` names it, or each of several that are name=source."""
    if isinstance(source, list):
        entries = (entry.partition("=") for entry in source)
        return sorted(f"{name}={recordable(place, folder)}" for name, _, place in entries)
    return recordable(source, folder) if source else source


def values_before_flags() -> dict[str, Any]:
    """What the discriminator did before there was a flag for it, where that is not what the flag's default says."""
    entries = dataclasses.fields(TrainingConfig)
    return {entry.name: before for entry in entries if (before := entry.metadata["before"]) is not None}


def check_identity(recorded: str, now: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the run in a checkpoint, whose identity is recorded as JSON, cannot be gone on with."""
    # What a checkpoint does not record was no flag yet, and was done as its default says, or in a way of its own.
    then = TrainingConfig.renamed(json.loads(recorded))
    before = values_before_flags() if now["lambda_adv"] > 0 else {}
    default = TrainingConfig(pretrained_teacher_model="any", video_data="any", expert=now["expert"])
    defaults = with_base_defaults(default, get_base_model(now["base_model"])).to_dict()
    flags = " ".join(f"--{name} {old}" for name, old in before.items() if name not in then and old != now[name])
    if changed := _changes(defaults | before | then, now):
        raise ValueError(
            f"The run in {folder} cannot be gone on with other settings: {changed}."
            + (f" It began before there were flags for all of them; go on with {flags}" if flags else "")
        )


def told_changes(then: dict[str, Any], now: dict[str, Any], folder: Path) -> str | None:
    """What to warn of: circumstances that are not what they were; None if nothing is known to have changed."""
    then, told = TrainingConfig.renamed(then), []
    length = {name: now[name] for name in ("max_train_steps",) if name in now}
    if changed := _changes(then, {name: value for name, value in now.items() if name not in length}):
        told.append(
            f"The run in {folder} goes on with something else than it was begun with: {changed}. If it is not the "
            "same under another name, what comes out is no longer one run's; a new one takes another --output_dir."
        )
    if changed := _changes(then, length):
        told.append(f"{changed}: from here on the learning rates are those of a schedule of that length.")
    return " ".join(told) or None


def check_data(then: dict[str, Any], now: dict[str, Any], folder: Path, skipped: list[str]) -> None:
    """Raise ValueError if the data are no longer those of the run in a checkpoint: it would read other samples."""
    if changed := _changes(then, now):
        first = "".join(f"\n  {name}" for name in skipped[:5])
        raise ValueError(
            f"The run in {folder} cannot be gone on with, for its data have changed and each sample would be another: "
            f"{changed}. Bring the data back as they were, or begin anew with another --output_dir."
            + (f" What cannot be used now:{first}" if skipped else "")
        )


def check_same_everywhere(sizes: list[dict[str, Any]]) -> None:
    """Raise ValueError if the data of the processes, by their number, are not the same: each would count on others."""
    for process, other in enumerate(sizes):
        if other != sizes[0]:
            raise ValueError(
                f"Process {process} sees other data than process 0: {_changes(sizes[0], other)} there. Each machine "
                "needs all files of the data, under the same names."
            )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What is not as it was, of what was known then."""
    known = [name for name in now if name in then]
    return "; ".join(f"{name} was {then[name]}, is {now[name]}" for name in known if then[name] != now[name])
