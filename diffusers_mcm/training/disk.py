"""A full disk, told as one: each library that writes has words of its own for it, and some have none."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import DiskFullError, existing_parent, is_disk_full
from ..wording import readable


@contextmanager
def room_for(what: str, folder: Path, size: int | None = None) -> Iterator[None]:
    """Turn whatever is raised for want of room into `DiskFullError`: what was written, where, how much is free.

    `what` is such as "a checkpoint"; `size` are the bytes that it takes, as far as is known.
    """
    try:
        yield
    except Exception as error:  # torch.save's, tensorboard's and safetensors' have nothing in common
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(existing_parent(folder)).free
        needed = "" if size is None else f"it takes about {readable(size)}, and "
        raise DiskFullError(
            errno.ENOSPC,
            f"No space left on the disk for {what}: {needed}{readable(free)} are free. Nothing half-written was "
            "left. Make room, or write elsewhere with --output_dir; fewer checkpoints are kept with "
            "--checkpoints_total_limit, or none written with --checkpointing_steps 0",
            str(folder),
        ) from error


def told_room(said: str, needed: float, folder: Path, instead: str, reused: int = 0) -> str:
    """What is written and what it takes, as `said`, with how much there is for it, `reused` bytes among that.

    ValueError, with what can be done `instead`, if it is less than the bytes that are `needed`.
    """
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free + reused:
        raise ValueError(f"{said}, where {readable(free)} are free: make room, {instead}.")
    return f"{said}, of {readable(free + reused)} that there are."


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write with `torch.save`, but to a file of Python's: its own calls a full disk 'unexpected pos'."""
    with path.open("wb") as file:
        torch.save(state, file)


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(size_of, state.values()))
    return sum(map(size_of, state)) if isinstance(state, list | tuple) else 0
