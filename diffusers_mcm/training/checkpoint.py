"""Checkpoints: written whole or not at all, and enough of them to go on bit for bit."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import whole_folder

STATE_FILE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None if 'latest' is wanted and there is none yet."""
    existing = checkpoints(output_dir)
    if wanted == "latest":
        return existing[-1] if existing else None
    for folder in (Path(wanted), output_dir / wanted):
        if (folder / STATE_FILE).is_file():
            return folder
    names = ", ".join(path.name for path in existing) or "none"
    raise ValueError(
        f"--resume_from_checkpoint {wanted!r} is not a checkpoint (a folder with {STATE_FILE}). "
        f"Checkpoints in {output_dir}: {names}."
    )


def save_checkpoint(
    output_dir: Path,
    step: int,
    state: dict[str, Any],
    write_more: Callable[[Path], None],
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` with the state and what `write_more` adds; then drop the oldest beyond the limit."""
    folder = output_dir / f"checkpoint-{step}"
    with whole_folder(folder) as temporary:
        write_more(temporary)
        torch.save(state, temporary / STATE_FILE)
    if total_limit is not None:
        for old in [path for path in checkpoints(output_dir) if path != folder][: -total_limit + 1 or None]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state, on the CPU."""
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"The checkpoint {folder} cannot be read: {error}") from error
