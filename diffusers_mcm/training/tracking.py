"""What a run tells while it goes: a line of JSON per logged step, the tracker, the progress bar."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..files import write_text

logger = logging.getLogger(__name__)
LOG_NAME = "train_log.jsonl"
# What to install for a tracker, where that is not its name.
_PACKAGES = {"tensorboard": "'diffusers-mcm[train]'", "comet_ml": "comet-ml"}


def check_tracker(report_to: str) -> None:
    """Raise ImportError, with what to install, if `--report_to` cannot be used; accelerate would pass over it."""
    if report_to == "none":
        return
    if report_to not in LOGGER_TYPE_TO_CLASS:
        raise ImportError(
            f"--report_to {report_to} needs a newer accelerate: pip install -U accelerate, or take one of "
            f"{', '.join(LOGGER_TYPE_TO_CLASS)}, none."
        )
    if report_to not in map(str, get_available_trackers()):
        package = _PACKAGES.get(report_to, report_to)
        raise ImportError(f"--report_to {report_to} needs it: pip install {package}, or --report_to none")


class PictureLog:
    """Sends pictures to the trackers of a run, and says once which of them take none."""

    def __init__(self, trackers: list):
        self.trackers = trackers
        self.refused: set[str] = set()

    def write(self, name: str, picture: np.ndarray, step: int) -> None:
        """Send a `picture`, (H, W, 3) uint8."""
        for tracker in self.trackers:
            if not hasattr(tracker, "log_images"):
                if tracker.name not in self.refused:
                    logger.info("accelerate sends %s no pictures; they are beside the LoRA.", tracker.name)
                self.refused.add(tracker.name)
                continue
            # One picture for these, a list of pictures for the others.
            value = picture if tracker.name in ("aim", "clearml") else picture[None]
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: value}, step=step, **options)


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient became NaN or infinite; the weights are those of the step before."""


def check_finite(values: dict[str, float], step: int, samples: range, last_checkpoint: Path | None) -> None:
    """Stop the run, with the cause, before a bad gradient reaches the weights."""
    listed = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    if not listed:
        return
    raise NonFiniteLoss(
        f"Training stopped at step {step}, samples {samples.start} to {samples.stop - 1}: {listed} (all: "
        f"{json.dumps(values)}). The weights were not changed by this step and nothing was overwritten. "
        f"{saved_in(last_checkpoint)} Lower the learning rates or --max_grad_norm, or use --mixed_precision bf16 or "
        "no."
    )


def saved_in(last_checkpoint: Path | None) -> str:
    return f"The newest checkpoint is {last_checkpoint}." if last_checkpoint else "There is no checkpoint yet."


class LossLog:
    """`train_log.jsonl`: appended line by line, and cut back to the step a run resumes from."""

    def __init__(self, output_dir: Path, first_step: int):
        self.path = output_dir / LOG_NAME
        lines = self.path.read_text(encoding="utf-8").splitlines() if first_step and self.path.is_file() else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= first_step))

    def write(self, row: dict[str, Any]) -> None:
        """Append a line, or leave the file as it was if there is no room for the whole of it."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            os.truncate(self.path, size)
            raise


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a killed run left unfinished
