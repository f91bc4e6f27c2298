"""Writing files: whole or not at all, and what a full disk is told as."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a library says whose errors carry no number: safetensors and tarfile wrap that of the system into their own.
_DISK_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "File too large")
# Of a model's folder, beside weights and what ends with config.json: `fingerprint` reads these.
_OF_A_MODEL = ("model_index.json", "tokenizer.json", "vocab.json", "merges.txt")
_READ_WHOLE, _BLOCK, _BLOCKS = 64 << 20, 4096, 256  # bytes, bytes and their number


class DiskFullError(OSError):
    """There was no room for a file. Nothing of it is left behind."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, says that a disk, a quota or a limit of file sizes is full."""
    if error is None:
        return False
    if isinstance(error, DiskFullError) or getattr(error, "errno", None) in _DISK_FULL:
        return True
    return any(text in str(error) for text in _DISK_FULL_TEXTS) or is_disk_full(error.__cause__ or error.__context__)


@contextmanager
def disk_full_told(path: str | Path) -> Iterator[None]:
    """Says which disk is full, whatever the library that met it says: a `DiskFullError` that names `path`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        # One of ours is of a part of what is written here, in a place that nobody knows.
        cause = error.__cause__ if isinstance(error, DiskFullError) else error
        there = existing_parent(Path(path))
        told = DiskFullError(
            f"The disk is full: there was no room to write {path} ({shutil.disk_usage(there).free / 1e6:.1f} MB are "
            f"free there). Nothing half-written was left; make room, or choose a place on another disk. ({cause})"
        )
        told.errno = getattr(cause, "errno", None) or errno.ENOSPC
        raise told from cause


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_takes_files(folder: Path, name: str) -> None:
    """`ValueError` that begins with the argument's name, if a folder, or the nearest one above it that is there, is
    none or takes no files. To be called before the work of which the files shall be the outcome."""
    there = existing_parent(folder)
    if not there.is_dir():
        raise ValueError(f"{name} {folder}: {there} is a file; name another folder, which need not be there yet.")
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        told = f"nothing can be written to {there} ({error.strerror or error})"
        raise ValueError(f"{name} {folder}: {told}; name another folder.") from None


def write_text(path: str | Path, text: str, synced: bool = False) -> None:
    """Write a text file in UTF-8, whole or not at all; `synced` as in `atomic_file`."""
    with atomic_file(path, synced) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; if the block raises, what was made goes again, unless something is in it."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            if not each.is_dir() or any(each.iterdir()):
                break
            each.rmdir()
        raise


def sync(path: Path) -> None:
    """Have a file, or a folder with all that is in it, on the disk itself, where a loss of power does not reach it."""
    inside = list(path.rglob("*")) if path.is_dir() else []
    for each in (*sorted(inside, key=lambda inner: inner.is_dir()), path):
        _sync_one(each)


def _sync_one(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, where the system opens none
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that has no such thing
            raise
    finally:
        os.close(opened)


@contextmanager
def atomic_file(path: str | Path, synced: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes if it raises.

    `synced` has it on the disk itself before the block is left, and the old file is there until then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_full_told(path), new_folders(path.parent):
        try:
            yield temporary
            if synced:
                sync(temporary)
            os.replace(temporary, path)
            if synced:
                _sync_one(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, synced: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, whatever that held, or vanishes if the block raises.

    `synced` as in `atomic_file`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # beside it, so that relative paths hold
    replaced = temporary.with_suffix(".old")
    with disk_full_told(path), new_folders(path.parent):
        try:
            yield _emptied(temporary)
            if synced:
                sync(temporary)
            if path.is_dir():  # a folder cannot replace one that holds something
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(path, replaced)
            os.replace(temporary, path)
            if synced:
                _sync_one(path.parent)
        finally:
            if replaced.is_dir() and not path.exists():
                os.replace(replaced, path)
            for leftover in (temporary, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def atomic_files(folder: Path, last: str, stale: Sequence[str] = (), synced: bool = False) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends, each at once, the file `last` last.

    An older `last` goes first, and with it the files and folders `stale` of an older save: a process that is killed in
    between leaves no folder of which half is old. `synced` as in `atomic_file`.
    """
    folder = Path(folder)
    # Inside it, not beside it: the folder may be the mount point of a file system of its own.
    temporary = folder / ".unfinished"
    with disk_full_told(folder), new_folders(folder):
        try:
            yield _emptied(temporary)
            if synced:
                sync(temporary)
            files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
            for old in (folder / name for name in (last, *stale)):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            for name in sorted(files, key=lambda name: str(name) == last):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
            for place in {(folder / name).parent for name in files} if synced else ():
                _sync_one(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_back(folder: Path, pattern: str) -> None:
    """Clear up after a process that was killed inside `atomic_folder`: half-written folders of names like `pattern`.

    One that was moved aside when the process ended is moved back.
    """
    for old in folder.glob(f".{pattern}.old"):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            os.replace(old, path)
    for leftover in (*folder.glob(f".{pattern}.tmp"), *folder.glob(f".{pattern}.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def _emptied(temporary: Path) -> Path:
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    return temporary


def sha256(path: Path) -> str:
    """The hash of a file, as the Hub shows it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """What tells the weights and configurations of a model, a file or a folder with all below it, from others.

    Of a file above 64 MiB, 256 blocks that are evenly spread over it are read, and all of a smaller one: a training
    changes weights everywhere. Where the model lies and how old its files are does not matter.
    """
    digest = hashlib.sha256()
    below = [] if path.is_file() else sorted(each for each in path.rglob("*") if _decides(each))
    for each in below or [path]:
        size = each.stat().st_size
        digest.update(f"{each.relative_to(path).as_posix()}\0{size}\0".encode())
        with each.open("rb") as file:
            if size <= _READ_WHOLE:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _decides(path: Path) -> bool:
    """Whether a file of a model's folder decides what it computes; a video's `metadata.json` does not."""
    is_weights = path.suffix in (".safetensors", ".sft", ".model")
    return path.is_file() and (is_weights or path.name.endswith(("config.json", *_OF_A_MODEL)))
