"""What a run tells while it goes: a line of JSON per logged step, the tracker, the progress bar."""

import json
from pathlib import Path
from typing import Any

import torch

LOG_NAME = "train_log.jsonl"


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient became NaN or infinite; the weights are those of the step before."""


def check_finite(values: dict[str, float], step: int, samples: range, last_checkpoint: Path | None) -> None:
    """Stop the run, with the cause, before a bad gradient reaches the weights."""
    bad = {name: value for name, value in values.items() if not torch.isfinite(torch.tensor(value))}
    if not bad:
        return
    listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
    saved = f"The newest checkpoint is {last_checkpoint}." if last_checkpoint else "There is no checkpoint yet."
    raise NonFiniteLoss(
        f"Training stopped at step {step}, samples {samples.start} to {samples.stop - 1}: {listed} (all: "
        f"{json.dumps(values)}). The weights were not changed by this "
        f"step and nothing was overwritten. {saved} Lower the learning rates or --max_grad_norm, or use "
        "--mixed_precision bf16 or no."
    )


class LossLog:
    """`train_log.jsonl`: appended line by line, and cut back to the step a run resumes from."""

    def __init__(self, output_dir: Path, first_step: int):
        self.path = output_dir / LOG_NAME
        kept = []
        if first_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a killed run left unfinished
