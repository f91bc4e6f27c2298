"""A full disk, told as one: each library that writes has words of its own for it, and some have none."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskFull(OSError):
    """There was no room for a file; what was written of it is gone, and what was there before is as it was."""


@contextmanager
def room_for(what: str, folder: Path, size: int | None = None) -> Iterator[None]:
    """Turn whatever is raised for want of room into `DiskFull`, which says what was written, where, how much is free.

    Args:
        what: What is written, such as "a checkpoint".
        size: How many bytes it takes, as far as is known.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save's and tensorboard's, safetensors' own
        if not _tells_of_a_full_disk(error):
            raise
        free = shutil.disk_usage(_existing(folder)).free
        needed = "" if size is None else f"it takes about {_readable(size)}, and "
        raise DiskFull(
            errno.ENOSPC,
            f"No space left on the disk for {what}: {needed}{_readable(free)} are free. Nothing half-written was "
            "left. Make room, or write elsewhere with --output_dir; fewer checkpoints are kept with "
            "--checkpoints_total_limit, or none written with --checkpointing_steps 0",
            str(folder),
        ) from error


def _tells_of_a_full_disk(error: BaseException | None) -> bool:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, SafetensorError) and any(f"os error {code}" in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def save_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save` through a file of Python's: of the path's own it reports a full disk as 'unexpected pos'."""
    with path.open("wb") as file:
        torch.save(state, file)


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(size_of, state.values()))
    return sum(map(size_of, state)) if isinstance(state, list | tuple) else 0


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
