"""Checkpoints: written whole or not at all, with what it takes to go on bit for bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_folder
from .disk import room_for, save_state, size_of

STATE_FILE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not output_dir.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in output_dir.iterdir()]
    found = {path: int(match[1]) for path, match in matches if match and is_checkpoint(path)}
    return sorted(found, key=found.__getitem__)


def is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()


def named_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint of this path, or of this name in `output_dir`."""
    for folder in (Path(wanted), output_dir / wanted):
        if is_checkpoint(folder):
            return folder
    names = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise ValueError(
        f"--resume_from_checkpoint {wanted!r} is not a checkpoint (a folder with {STATE_FILE}). "
        f"Checkpoints in {output_dir}: {names}."
    )


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
