"""Checkpoints, written whole or not at all, and which of those in a folder belong to the run that writes there."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_folder, write_text
from .disk import room_for, save_state, size_of

STATE_FILE = "training_state.pt"
RECORD_NAME = "mcm_run.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal() and is_checkpoint(path)}
    return sorted(found, key=found.__getitem__)


def is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()


def save_checkpoint(output_dir: Path, step: int, state: dict[str, Any], write_more: Callable[[Path], object]) -> Path:
    """Write `checkpoint-<step>` with the state and what `write_more` adds, whole or not at all.

    Raises `DiskFullError` if there is no room; a checkpoint of that name that was there before stays.
    """
    folder = output_dir / f"checkpoint-{step}"
    with room_for(f"the checkpoint of step {step}", output_dir, size_of(state)), atomic_folder(folder) as temporary:
        write_more(temporary)
        save_state(state, temporary / STATE_FILE)
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU."""
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"The checkpoint {folder} cannot be read: {error}") from error


@dataclass
class RunRecord:
    """The run that writes into a folder, and the line of checkpoints that its state follows from.

    Going back to one of them leaves those after it out of the line, in their places: `latest` no longer means them.
    """

    output_dir: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # its checkpoints hold it too
    # Names, oldest first. The first may be a path to another folder, from which the run was gone on with here.
    line: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, output_dir: Path) -> "RunRecord | None":
        """The record of the run that wrote into a folder last; None if none was kept. ValueError if it is damaged."""
        file = output_dir / RECORD_NAME
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(output_dir, str(values["run"]), [str(name) for name in values["checkpoints"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Without the file, 'latest' is the checkpoint with the most steps."
            ) from error

    @property
    def existing(self) -> list[Path]:
        """The checkpoints of the line that are still there."""
        return [self.output_dir / name for name in self.line if is_checkpoint(self.output_dir / name)]

    @property
    def others(self) -> list[Path]:
        """Checkpoints in the folder that are not of the line."""
        return [folder for folder in checkpoints(self.output_dir) if folder.name not in self.line]

    def told_others(self, folder: Path) -> str | None:
        """What to warn of when a run goes on from `folder`: checkpoints that do not lead there; None if all do."""
        if not self.others:
            return None
        return (
            f"{_names(self.others)} in {self.output_dir} do not lead to {folder.name}: 'latest' will not mean them, "
            "and each is replaced when this run writes one of its name."
        )

    def add(self, folder: Path) -> None:
        """Put a checkpoint that was written in the folder at the end of the line."""
        self.line = [*(name for name in self.line if name != folder.name), folder.name]
        self.write()

    def drop_beyond(self, limit: int) -> None:
        """Delete the checkpoints of the line that are in this folder, but for the newest `limit`."""
        for folder in [folder for folder in self.existing if folder.parent == self.output_dir][:-limit]:
            shutil.rmtree(folder)

    def write(self) -> None:
        values = {"run": self.id, "checkpoints": self.line}
        write_text(self.output_dir / RECORD_NAME, json.dumps(values, indent=2) + "\n")


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The folder to go on from, as `--resume_from_checkpoint` says; None where a run is to start.

    'latest' is the newest checkpoint of the run that wrote into `output_dir` last, on the branch that it was on.
    Raises ValueError where there is no such checkpoint, and where a new run would write among those of another.
    """
    present = checkpoints(output_dir)
    if wanted is None:
        if present:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run ({_names(present)}), among which a new run would "
                "write its own. Go on with that run by --resume_from_checkpoint latest, name another --output_dir, or "
                "move or delete those checkpoints."
            )
        return None
    if wanted != "latest":
        for folder in (Path(wanted), output_dir / wanted):
            if is_checkpoint(folder):
                return folder
        raise ValueError(
            f"--resume_from_checkpoint {wanted!r} is not a checkpoint (a folder with {STATE_FILE}). "
            f"Checkpoints in {output_dir}: {_names(present) or 'none'}."
        )
    record = RunRecord.read(output_dir)
    line = present if record is None else record.existing
    if not line and present:
        raise ValueError(
            f"--resume_from_checkpoint latest: the run that wrote into {output_dir} last has no checkpoint there; "
            f"those that are there ({_names(present)}) are of another one. Name one of them, or another --output_dir."
        )
    return line[-1] if line else None


def go_on(output_dir: Path, folder: Path, run: str | None) -> RunRecord:
    """The record of a run that goes on from the checkpoint `folder`, which says that it is of `run` (None: nothing).

    Raises ValueError if it would write among the checkpoints of another run.
    """
    # Resolved: where a folder is a link, `..` leads elsewhere than its path says.
    there, here = folder.resolve(), output_dir.resolve()
    record, inside = RunRecord.read(output_dir), there.parent == here
    others = [one for one in checkpoints(output_dir) if not inside or one.name != there.name]
    same = run == record.id if record and run else inside
    if others and not same:
        raise ValueError(
            f"{output_dir} holds checkpoints of another run ({_names(others)}) than {folder}, and what goes on from "
            "that would write among them. Name another --output_dir, or move or delete those checkpoints."
        )
    name = there.name if inside else Path(os.path.relpath(there, here)).as_posix()
    # Before runs were recorded a folder's checkpoints were those of one run.
    line = record.line if record else [one.name for one in checkpoints(output_dir)]
    line = line[: line.index(name) + 1] if name in line else [name]
    return RunRecord(output_dir, run or (record.id if record and same else uuid.uuid4().hex), line)


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders)
