"""Checkpoints, written whole or not at all, and which of those in a folder belong to the run that writes there."""

import json
import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_folder, put_back, write_text
from ..wording import first_names
from .disk import room_for, save_state, size_of

logger = logging.getLogger(__name__)
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
    """Write `checkpoint-<step>` with the state and what `write_more` adds, whole or not at all, on the disk itself.

    Raises `DiskFullError` if there is no room; a checkpoint of that name that was there before stays.
    """
    folder = output_dir / f"checkpoint-{step}"
    what, size = f"the checkpoint of step {step}", size_of(state)
    with room_for(what, output_dir, size), atomic_folder(folder, synced=True) as temporary:
        write_more(temporary)
        save_state(state, temporary / STATE_FILE)
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. ValueError if it cannot be read, or a bit of it is not as it was."""
    file = folder / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch reads the sums that it writes, and does not compare them
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"The checkpoint {folder} cannot be read: {error}") from error
    if damaged:
        raise ValueError(f"The checkpoint {folder} cannot be read: {damaged} in {STATE_FILE} is not what was written.")
    return state


def open_checkpoint(output_dir: Path, wanted: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its state, as `--resume_from_checkpoint` says; None where a run is to start.

    Where the newest cannot be read 'latest' is the one before it, and a warning says so. Raises ValueError as
    `find_checkpoints` does, and where none can be read.
    """
    found = find_checkpoints(output_dir, wanted)
    for folder in found:
        try:
            return folder, load_checkpoint(folder)
        except ValueError as error:
            if folder == found[-1]:
                raise
            logger.warning("%s The one before it is gone on from.", error)
    return None


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
        write_text(self.output_dir / RECORD_NAME, json.dumps(values, indent=2) + "\n", synced=True)


def clear_up(output_dir: Path) -> None:
    """Remove what a killed run left half-written; a checkpoint that it was replacing is whole again."""
    put_back(output_dir, "checkpoint-*")


def find_checkpoints(output_dir: Path, wanted: str | None) -> list[Path]:
    """The folders to go on from, best first, as `--resume_from_checkpoint` says; none where a run is to start.

    'latest' is the newest checkpoint of the run that wrote into `output_dir` last, on the branch that it was on, then
    those before it. Raises ValueError where there is no such checkpoint, and where a new run would write among the
    files of another.
    """
    present = checkpoints(output_dir)
    if wanted is None:
        _check_empty(output_dir, present)
        return []
    if wanted != "latest":
        for folder in (Path(wanted), output_dir / wanted):
            if is_checkpoint(folder):
                return [folder]
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
    return line[::-1]


def _check_empty(output_dir: Path, present: list[Path]) -> None:
    """Raise ValueError if a new run would write among the files of something else."""
    if present:
        raise ValueError(
            f"{output_dir} holds checkpoints of another run ({_names(present)}), among which a new run would "
            "write its own. Go on with that run by --resume_from_checkpoint latest, name another --output_dir, or "
            "move or delete those checkpoints."
        )
    # Hidden files and the folder of a file system's own belong to no run.
    names = [path.name for path in output_dir.glob("*") if path.name[0] != "." and path.name != "lost+found"]
    if names:
        raise ValueError(
            f"--output_dir {output_dir} is not empty ({first_names(sorted(names))}). Name another folder, or "
            "write there all the same with --resume_from_checkpoint latest, which starts anew where there is "
            "no checkpoint."
        )


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
