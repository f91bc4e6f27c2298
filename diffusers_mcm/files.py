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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, whatever that held, or vanishes if the block raises."""
    path = Path(path)
    temporary = _emptied(path.with_name(f".{path.name}.tmp"))  # beside it, so that relative paths hold
    replaced = temporary.with_suffix(".old")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot replace one that holds something
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        if replaced.is_dir() and not path.exists():
            os.replace(replaced, path)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def whole_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends, each at once, the file `last` last.

    An older `last` goes first: a process that is killed in between leaves no folder of which half is old.
    """
    # Inside it, not beside it: the folder may be the mount point of a file system of its own.
    temporary = _emptied(folder / ".unfinished")
    try:
        yield temporary
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        (folder / last).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: str(name) == last):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _emptied(temporary: Path) -> Path:
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    return temporary
