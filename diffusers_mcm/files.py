"""Writing files: whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes if it raises."""
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, whatever that held, or vanishes if the block raises."""
    path = Path(path)
    temporary = _beside(path)
    replaced = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():  # a folder cannot replace one that holds something
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        if replaced.is_dir() and not path.exists():
            os.replace(replaced, path)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
