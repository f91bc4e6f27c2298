"""The files of tars, read from their headers once and kept in a small database, from which a later start takes them.

A tar that has changed since is read anew. What is kept is written tar by tar, so that a start that was stopped goes on
where it was.
"""

import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import constants

from .faults import is_remote
from .remote import file_version
from .shards import Member, read_headers

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # remote tars whose headers are read side by side: it is the way there and back that takes long
_BLOCK = 512
_TABLE = "CREATE TABLE IF NOT EXISTS tars (path TEXT PRIMARY KEY, version TEXT, members BLOB) WITHOUT ROWID"
T = TypeVar("T")
_told: set[str] = set()  # why the index was not kept, which is told once


class TarMembers(NamedTuple):
    """What the headers of a tar say."""

    members: list[Member]
    problem: str | None  # what is wrong with it
    version: Any  # of the tar that was read, as `file_version` tells it


def index_file() -> Path:
    """Where indexes are kept: `$DIFFUSERS_MCM_CACHE/tars.sqlite`, by default in the folder of the Hub's library."""
    folder = os.environ.get("DIFFUSERS_MCM_CACHE") or os.path.join(constants.HF_HOME, "diffusers-mcm")
    return Path(folder, "tars.sqlite")


def read_tars(paths: Sequence[str]) -> Iterator[TarMembers]:
    """What is in each of these tars, in their order: as it was kept, or else by its headers, and then kept."""
    unsaved = _Unsaved()
    pool = ThreadPoolExecutor(_AT_ONCE)
    side_by_side = pool.map if any(map(is_remote, paths)) else map
    try:
        versions = list(side_by_side(file_version, paths))
        kept = _read_kept(paths, versions)
        missing = [(path, version) for path, version in zip(paths, versions) if path not in kept]
        if len(missing) > _AT_ONCE and side_by_side is not map:
            logger.info("Reading the headers of %d remote tars, which is done once.", len(missing))
        read = side_by_side(_read, missing)
        for path, version in zip(paths, versions):
            found = _unpacked(kept[path], version) if path in kept else None
            if found is None:
                found = next(read) if path not in kept else _read((path, version))
                unsaved.add(path, found)
            yield found
    finally:
        unsaved.save()
        pool.shutdown(cancel_futures=True)


def _read(tar: tuple[str, Any]) -> TarMembers:
    path, version = tar
    return TarMembers(*read_headers(path), version)


class _Unsaved:
    """What was read and is not in the database yet: it gets there once a second, for each time takes a moment."""

    def __init__(self):
        self.rows: list[tuple[str, str, bytes]] = []
        self.saved = time.monotonic()

    def add(self, path: str, found: TarMembers) -> None:
        if found.version is not None and found.members:
            self.rows.append((_key(path), json.dumps(found.version), _pack(found.members, found.problem)))
        if time.monotonic() - self.saved > 1:
            self.save()

    def save(self) -> None:
        def write(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO tars VALUES (?, ?, ?)", self.rows)

        if self.rows:
            _in_database(write, None)
        self.rows, self.saved = [], time.monotonic()


# -- the database -----------------------------------------------------------------------------------------------------


def _key(path: str) -> str:
    """The path of a tar as text, which names of files need not be."""
    return path if is_remote(path) else os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")


def _in_database(use: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
    """What `use` makes of the database; `otherwise` where there is none to be had: which costs time, and is told."""
    file = index_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=60)) as database, database:
            database.execute(_TABLE)
            return use(database)
    except (OSError, sqlite3.Error) as error:
        _tell(file, error)
        return otherwise


def _tell(file: Path, error: Exception) -> None:
    if str(file) not in _told:
        _told.add(str(file))
        logger.warning("The index of tars is not kept in %s (%s): their headers are read at each start.", file, error)


def _read_kept(paths: Sequence[str], versions: Sequence[Any]) -> dict[str, bytes]:
    """What is kept, packed, of those of the tars that have not changed since."""

    def read(database: sqlite3.Connection) -> dict[str, bytes]:
        found = {}
        for path, version in zip(paths, versions):
            row = database.execute("SELECT version, members FROM tars WHERE path = ?", (_key(path),)).fetchone()
            if row is not None and version is not None and row[0] == json.dumps(version):
                found[path] = row[1]
        return found

    return _in_database(read, {}) if index_file().exists() else {}


def _unpacked(packed: bytes, version: Any) -> TarMembers | None:
    try:
        return TarMembers(*_unpack(packed), version)
    except (ValueError, zlib.error):
        return None  # it is damaged


def _pack(members: Sequence[Member], problem: str | None) -> bytes:
    """Names, sizes and the blocks of 512 bytes from the end of one file to the data of the next, compressed."""
    gaps, end = [], 0
    for member in members:
        gaps.append((member.offset - end) // _BLOCK)
        end = member.offset + -(-member.size // _BLOCK) * _BLOCK
    columns = [[member.name for member in members], [member.size for member in members], gaps, problem]
    return zlib.compress(json.dumps(columns, separators=(",", ":"), ensure_ascii=False).encode(), 9)


def _unpack(packed: bytes) -> tuple[list[Member], str | None]:
    names, sizes, gaps, problem = json.loads(zlib.decompress(packed))
    members, end = [], 0
    for name, size, gap in zip(names, sizes, gaps, strict=True):
        members.append(Member(name, end + gap * _BLOCK, size))
        end = members[-1].offset + -(-size // _BLOCK) * _BLOCK
    return members, problem
