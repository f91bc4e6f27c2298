"""Files and parts of them, on this machine or, by an address that `fsspec` knows, on another: nothing is copied first.

Of a remote file only what is asked for comes over the network. Nothing here is kept between calls but what `fsspec`
keeps for the process it is in, so that data sets can be pickled and worker processes forked.
"""

import importlib
import io
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import IO, Any, TypeVar

from .faults import MachineError, check_own_fault, is_of_the_machine, is_remote

_PAUSES = (1.0, 4.0)  # seconds before a remote file is tried again: connections are lost for a moment
_AHEAD = 1 << 16  # bytes read ahead of what is asked for, in which the small files of a tar lie beside its headers
# What file systems say of a file's version: HTTP, S3, the Hub and those of memory and disks.
_VERSIONS = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created", "blob_id")
_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
T = TypeVar("T")


def file_system(address: str) -> tuple[Any, str]:
    """The `fsspec` file system of an address, and the path in it; an error that names the package it lacks."""
    protocol = address.partition("://")[0]
    try:
        return importlib.import_module("fsspec").core.url_to_fs(address)
    except ImportError as error:
        package = _EXTRAS.get(protocol, "a package of its own")
        raise ImportError(f"Reading {address} needs {package} (pip install {package}): {error}") from error
    except ValueError as error:
        raise ValueError(f"{address!r} is no address of data: {error}") from error


def _patiently(read: Callable[[], T], name: str) -> T:
    """What `read` gives, tried again where the connection is lost; `MachineError` if that does not help."""
    for pause in _PAUSES:
        try:
            return read()
        except Exception as error:
            if isinstance(error, MachineError) or not is_of_the_machine(error, name):
                raise _as_system_error(error) from error
            time.sleep(pause)
    try:
        return read()
    except Exception as error:
        check_own_fault(error, name)
        raise _as_system_error(error) from error


def _as_system_error(error: Exception) -> Exception:
    """An answer of a server as the `OSError` that callers expect; some libraries have classes of their own."""
    return OSError(f"{type(error).__name__}: {error}") if getattr(error, "status", None) else error


def read_part(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, or fewer where it ends before; one request where the file is remote."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    return _patiently(lambda: _remote_part(path, offset, size), path)


def _remote_part(path: str, offset: int, size: int) -> bytes:
    system, inside = file_system(path)
    if system.async_impl:
        data = system.cat_file(inside, start=offset, end=offset + size)
    else:  # whose `cat_file` asks for the size of the whole first, and reads ahead
        with system.open(inside, "rb", block_size=max(size, 1), cache_type="none", size=offset + size) as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) > size:
        raise _no_parts(path)
    return data


def _no_parts(path: str) -> MachineError:
    return MachineError(
        f"{path}: its server gives whole files only, and reading data in place needs parts of them (HTTP ranges). "
        "Copy the data to this machine, or put them on a server that gives parts."
    )


def read_whole(path: str) -> io.BytesIO:
    """A remote file in memory: a film is read from its first byte to its last anyway, to find its frames."""

    def read() -> bytes:
        with importlib.import_module("datasets.utils.file_utils").xopen(path, "rb") as file:
            return file.read()

    return io.BytesIO(_patiently(read, path))


def open_file(path: str) -> IO[bytes]:
    """A binary file that can be searched in; of a remote one no more is read than what is asked for, and a bit."""
    if not is_remote(path):
        return open(path, "rb")
    system, inside = file_system(path)
    file = _patiently(lambda: system.open(inside, "rb", block_size=_AHEAD, cache_type="readahead"), path)
    try:
        file.seek(1)
        if path.startswith(("http://", "https://")) and file.size:  # all other servers give parts
            file.seek(-1, os.SEEK_END)
            file.read(1)
    except ValueError as error:  # what `fsspec` streams, or an answer with the whole file
        raise _no_parts(path) from error
    file.seek(0)
    return file


def file_version(path: str | os.PathLike) -> list[Any] | None:
    """Size and time of change of a file, or what its server says of its version; None if there is no such file."""
    if is_remote(os.fspath(path)):
        return _patiently(lambda: _remote_version(os.fspath(path)), os.fspath(path))
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _remote_version(path: str) -> list[Any] | None:
    system, inside = file_system(path)
    try:
        found = system.info(inside)
    except FileNotFoundError as error:
        if is_of_the_machine(error, path):
            raise
        return None
    lfs = found.get("lfs") or {}
    known = [found.get(name) for name in _VERSIONS] + [lfs.get("sha256") if isinstance(lfs, dict) else None]
    return [found.get("size"), *(str(value) for value in known if value is not None)]


def join(folder: str, path: str) -> str:
    """A path below a folder, or below an address."""
    return f"{folder.rstrip('/')}/{path}" if is_remote(folder) else os.path.join(folder, path)


def list_remote(address: str) -> list[str] | None:
    """Sorted paths of the files below a remote folder, relative to it, but for hidden ones; None if it is none."""
    system, inside = file_system(address)
    inside = inside.rstrip("/")

    def listed() -> list[str] | None:
        return system.find(inside) if system.isdir(inside) else None

    files = _patiently(listed, address)
    if files is None:
        return None
    names = (name.removeprefix("/").removeprefix(inside.removeprefix("/")).lstrip("/") for name in files)
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def expand(address: str) -> list[str]:
    """The addresses that one with `*` or WebDataset's `{000..039}` stands for; those that are there, sorted.

    What is written out in braces needs no listing, which `https` servers seldom give.
    """
    addresses = expand_braces(address)
    if not any(character in address for character in "*?["):
        return addresses
    found = []
    for each in addresses:
        system, inside = file_system(each)
        found += [system.unstrip_protocol(name) for name in _patiently(partial(system.glob, inside), each)]
    return sorted(found)


def expand_braces(address: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{a,b}` -> a, b."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", address)
    if found is None:
        return [address]
    first, last, names = found.groups()
    if names is None:
        width = len(first) if first.startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        options = names.split(",")
    before, after = address[: found.start()], address[found.end() :]
    return [each for option in options for each in expand_braces(f"{before}{option}{after}")]
