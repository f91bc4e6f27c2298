"""What must be, and what should be, the same in the parts of one run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..hub import recordable_source
from .config import VALUES_BEFORE_FLAGS, TrainingConfig, default_values
from .networks import Networks

# With one of these changed, or a flag of the method, it would not be the same run that goes on.
_FIXED = (
    "base_model clip_size lora_rank lora_alpha seed total_batch learning_rate discriminator_learning_rate scale_lr "
    "lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm frame_interval "
    "data_fps"
).split()
# These may change on purpose: a path, where a folder was moved, a precision on another machine.
_SOURCES = "pretrained_teacher_model discriminator_features discriminator_text video_data image_data".split()
_TOLD = "revision caption_column image_caption_column video_column image_column mixed_precision fold_lora".split()


def identity(
    config: TrainingConfig, networks: Networks, total_batch: int, samples_per_coin: int, image_text: str
) -> dict[str, Any]:
    """What must not change between the parts of one run; `image_text` is the rule that --image_text came to."""
    values = {**config.to_dict(), "total_batch": total_batch, "clip_size": list(networks.clip_size)}
    values["base_model"], values["image_text"] = networks.base.name, image_text
    if config.coin == "batch":  # which then depends on how the total batch is split
        values["coin"] = f"batch (of {samples_per_coin})"
    method = [entry.name for entry in dataclasses.fields(config) if entry.metadata["group"] == "method"]
    return {name: values[name] for name in (*_FIXED, *method)}


def circumstances(config: TrainingConfig, output_dir: Path) -> dict[str, Any]:
    """What should not change, and is told if it does: data, networks, precision; paths relative to the output."""
    values = config.to_dict()
    sources = {
        name: None if values[name] is None else recordable_source(values[name], output_dir) for name in _SOURCES
    }
    return sources | {name: values[name] for name in _TOLD}


def check_identity(recorded: str, now: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the run in a checkpoint, whose identity is recorded as JSON, cannot be gone on with."""
    # What a checkpoint does not record was no flag yet, and was done as its default says, or in a way of its own.
    then = json.loads(recorded)
    before = VALUES_BEFORE_FLAGS if now["lambda_adv"] > 0 else {}
    unrecorded, then = before.keys() - then.keys(), default_values() | before | then
    changed = _changes(then, now)
    if changed:
        flags = " ".join(f"--{name} {then[name]}" for name in before if name in unrecorded and then[name] != now[name])
        raise ValueError(
            f"The run in {folder} cannot be gone on with other settings: {changed}."
            + (f" It began before there were flags for all of them; go on with {flags}" if flags else "")
        )


def told_changes(then: dict[str, Any], now: dict[str, Any], folder: Path) -> str | None:
    """What to warn of: circumstances that are not what they were; None if nothing is known to have changed."""
    changed = _changes(then, {name: value for name, value in now.items() if name in then})
    if not changed:
        return None
    return (
        f"The run in {folder} goes on with something else than it was begun with: {changed}. If it is not the same "
        "under another name, what comes out is no longer one run's; a new one takes another --output_dir."
    )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(f"{name} was {then[name]}, is {now[name]}" for name in now if then[name] != now[name])
