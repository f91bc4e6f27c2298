"""The files of a WebDataset tar, found by its headers alone, and the samples that they make.

A sample is a video or image with the json and text files that have its name. Names are split as WebDataset does, at
the first dot, and where that joins several files of the kind ("clip.v1.mp4", "clip.v2.mp4") at the last one.
"""

import os
import tarfile
from collections.abc import Iterable
from typing import IO, NamedTuple

from .columns import CAPTION_COLUMNS, MediaKind
from .faults import check_own_fault, is_remote
from .remote import open_file

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


HEADER = tarfile.BLOCKSIZE  # bytes of the header that stands before each file
_IN_HEADER = 8 << 30  # sizes from here on may stand elsewhere


class Member(NamedTuple):
    """A file in a tar: where its bytes are."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """A video or image, and the files that belong to it by their fields ("json", "txt", "meta.json")."""

    media: Member
    fields: dict[str, Member]


def read_headers(path: str) -> tuple[list[Member], str | None]:
    """The files of a tar by their headers, and what is wrong with it; of a broken tar those that are whole.

    `MachineError` if it is the machine that cannot read it: without a shard all samples would be others.
    """
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            members, problem = _read_members(path, file, size)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        check_own_fault(error, path)
        return [], _describe_no_tar(path, error)
    if not members:
        return [], problem or "it holds no files"
    return members, problem and f"{problem}; read are the {len(members)} files before"


def _read_members(path: str, file: IO[bytes], size: int) -> tuple[list[Member], str | None]:
    """The files of a tar of `size` bytes that are whole, and what is wrong with the rest."""
    members: dict[str, Member] = {}
    problem = None
    fileobj = file if is_remote(path) else None
    with tarfile.open(path, "r:", fileobj, encoding="utf-8", errors="surrogateescape") as tar:
        try:
            while (entry := tar.next()) is not None:
                _add_member(members, entry, size)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            problem = f"it is broken ({error})"
        end = tar.offset
    return list(members.values()), problem or _find_problem_at_end(file, end, size)


def _add_member(members: dict[str, Member], entry: tarfile.TarInfo, size: int) -> None:
    name = _plain(entry.name)
    if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):  # hidden, or a Mac's
        return
    if entry.islnk() and _plain(entry.linkname) in members:  # a second name of a file before it
        members[name] = members[_plain(entry.linkname)]._replace(name=name)
    elif entry.isreg() and not entry.issparse() and entry.offset_data + entry.size <= size:
        members[name] = Member(name, entry.offset_data, entry.size)


def is_header(block: bytes, size: int) -> bool:
    """Whether a block of `HEADER` bytes is the header of a file of `size` bytes."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return found.size == size or size >= _IN_HEADER


def _plain(name: str) -> str:
    """A member's name without "./"; Arrow keeps no bytes that are not UTF-8."""
    return os.path.normpath(name).lstrip("/").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _find_problem_at_end(file: IO[bytes], end: int, size: int) -> str | None:
    """A tar ends in zeros: whether this one does from byte `end` on, where `tarfile` saw no further header."""
    if end >= size:
        return "it breaks off without an end mark"
    file.seek(end)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return f"it cannot be read from byte {end} on"
    return None


def _describe_no_tar(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError):
        return str(error)
    with open_file(path) as file:
        start = file.read(40)
    if not start:
        return "it is empty (0 bytes)"
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed, and samples are read in any order: unpack it with {command}"
    return f"it is not a tar ({error}): it begins with {start!r}"


def field_of(name: str) -> str:
    """The field of a file: what follows the first dot of its name, in lower case: `x/a.caption.TXT` -> caption.txt"""
    return os.path.basename(name).partition(".")[2].lower()


def group(
    members: Iterable[Member], kind: MediaKind, media_field: str | None = None
) -> tuple[list[Sample], dict[str, str]]:
    """The samples among a tar's files, in their order, and why others that look like some are not.

    `media_field` is the field of the videos or images, such as "mp4" or "left.mp4"; by default any of the kind.
    """
    groups: dict[str, tuple[list[Member], list[Member]]] = {}
    for member in members:
        name = field_of(member.name)
        extension = name.rpartition(".")[2]
        is_media = f".{extension}" in kind.extensions and media_field in (None, name, extension)
        if is_media or extension in ("json", *CAPTION_COLUMNS):
            key = os.path.join(os.path.dirname(member.name), os.path.basename(member.name).partition(".")[0])
            groups.setdefault(key, ([], []))[not is_media].append(member)
    samples, left = [], {}
    for key, (media, companions) in groups.items():
        if not media:
            left[companions[0].name] = f"it has no {kind.name} beside it"
        elif len(media) == 1:
            samples.append(_sample(media[0], companions))
        else:
            samples += _split(key, media, companions, kind, left)
    return samples, left


def _sample(media: Member, companions: list[Member]) -> Sample:
    stem = os.path.splitext(media.name)[0] + "."
    names = [name[len(stem) :].lower() if name.startswith(stem) else field_of(name) for name, *_ in companions]
    return Sample(media, dict(zip(names, companions)))


def _split(key: str, media: list[Member], companions: list[Member], kind: MediaKind, left: dict) -> list[Sample]:
    """Several files share their name up to its first dot: each that has captions of its own is a sample."""
    order = {extension: place for place, extension in enumerate(kind.extensions)}
    stems: dict[str, Member] = {}  # of the same clip in two containers one is enough
    for member in sorted(media, key=lambda member: order[os.path.splitext(member.name)[1].lower()]):
        stems.setdefault(os.path.splitext(member.name)[0], member)
    own: dict[str | None, list[Member]] = {}
    for member in companions:
        fitting = [stem for stem in stems if member.name.startswith(stem + ".")]
        own.setdefault(max(fitting, key=len, default=None), []).append(member)
    samples, flag = [], f"--{kind.name}_column"
    for stem in dict.fromkeys(os.path.splitext(member.name)[0] for member in media):
        member, name = stems[stem], field_of(stems[stem].name)
        if stem == key or stem in own or (key not in stems and None not in own):
            samples.append(_sample(member, own.get(stem, [])))
        elif key in stems:
            left[member.name] = f"it is taken for a part of {stems[key].name}; read it with {flag} {name}"
        else:
            left[member.name] = f"it shares {own[None][0].name} with others; read it with {flag} {name}"
    return samples
