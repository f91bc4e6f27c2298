"""The rows of a data set, whatever it was opened from: for each a file, its captions and its name."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .columns import DataRequest, caption_texts
from .faults import UnusableItem, is_remote
from .remote import file_version, join

GOLDEN_RATIO = (5**0.5 - 1) / 2  # whose multiples, less their whole parts, are spread evenly over [0, 1)
_CHUNK = 65_536  # rows that are Python objects at one time
NO_CAPTION = "it has no caption"
NO_TEXT = "its caption is neither a text nor a list of texts"


def examples(reasons: Mapping[str, str], count: int = 5) -> str:
    """The first of what was skipped, a line each, for a message."""
    return "".join(f"\n  {name}: {reason}" for name, reason in itertools.islice(reasons.items(), count))


def digest(chunks: Iterable) -> str:
    """A short digest of columns of Arrow, given by their chunks."""
    return _digest_of(chunk.slice(at, _CHUNK).to_pylist() for chunk in chunks for at in range(0, len(chunk), _CHUNK))


def _digest_of(values: Iterable) -> str:
    state = hashlib.blake2b(digest_size=8)
    for value in values:
        state.update(repr(value).encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def _size(path: str) -> int:
    """The size of a file of this machine in bytes; -1 for one of another, and where there is none."""
    try:
        return -1 if is_remote(path) else os.stat(path).st_size
    except OSError:
        return -1


class MediaRows:
    """The rows of a data set, kept as columns of a `pyarrow.Table` or `datasets.Dataset` and not as objects.

    `skipped` has name and reason of what was seen on opening to be of no use, and is not among the rows.
    """

    unnamed: str | None = None  # a sentence on files beside those of the rows, if there are any that no row names
    far_captions = False  # whether each caption has to be fetched from another machine

    def __init__(self, request: DataRequest, table: Any, skipped: Mapping[str, str] | None = None):
        self.source, self.kind, self.table = request.source, request.kind, table
        self.skipped = dict(skipped or {})

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.table[name][row].as_py() for name in self.table.column_names}

    def media(self, item: Mapping) -> dict:
        """The item's file: `{"path": str | None, "bytes": bytes | None}`."""
        raise NotImplementedError

    def captions(self, item: Mapping) -> list[str] | None:
        """All captions of the item, none of them empty; None if what stands there is no caption."""
        raise NotImplementedError

    def name(self, row: int, item: Mapping) -> str:
        """How to name the item in a message: its path, within its tar if it lies in one."""
        raise NotImplementedError

    def caption(self, item: Mapping, uniform: float = 0.0) -> str:
        """The item's caption, of several the one that `uniform` in [0, 1) chooses.

        Without one it is "" for an image, and a video is an `UnusableItem`.
        """
        if texts := self.captions(item):
            return texts[int(uniform * len(texts))]
        if self.kind.needs_caption:
            raise UnusableItem(NO_CAPTION if texts is not None else NO_TEXT)
        return ""

    def stamp(self, item: Mapping) -> Any:
        """What changes with the bytes of the item's file, as plain data; None if that cannot be told."""
        return None

    def said(self, item: Mapping) -> dict[str, Any]:
        """What the row of a metadata table says in the extra columns that were asked for, by their names there."""
        return {}

    def files(self) -> Sequence[Any] | None:
        """What tells the file of each row from the others'; None where each has its own, as far as is known."""
        return None

    def order(self) -> str | None:
        """A digest that the same rows in the same order have, wherever they lie; None if it cannot be told."""
        return None

    def content(self) -> str | None:
        """A digest that changes with the captions and the sizes of the files, as far as both are told without a look
        into them; None if they are not."""
        return None

    def all_texts(self) -> Iterator[str]:
        """Every caption that may be drawn, of all rows; no media is read."""
        for item in self._caption_items():
            yield from self.captions(item) or ([] if self.kind.needs_caption else [""])

    def all_captions(self) -> Iterator[str]:
        """One caption of each row, as `caption` gives it, but for rows that it refuses; no media is read."""
        for row, item in enumerate(self._caption_items()):
            try:
                yield self.caption(item, row * GOLDEN_RATIO % 1)
            except UnusableItem:
                continue

    def _caption_items(self) -> Iterator[Mapping]:
        """All rows, of which only the captions will be asked for."""
        return (self[row] for row in range(len(self)))


class FolderRows(MediaRows):
    """Files of a folder: `file` is a path in it (bytes, as the file system has it), and `captions` a list of texts.

    `said` has the extra columns as JSON, or None.
    """

    def __init__(
        self, request: DataRequest, table: Any, folder: str, skipped: Mapping[str, str], unnamed: str | None = None
    ):
        super().__init__(request, table, skipped)
        self.folder, self.unnamed = folder, unnamed

    def said(self, item: Mapping) -> dict[str, Any]:
        return json.loads(item["said"] or "{}")

    def files(self) -> list[bytes]:
        return self.table["file"].to_pylist()

    def order(self) -> str:
        return digest(self.table["file"].chunks)

    def content(self) -> str:
        import pyarrow as pa

        files = (os.fsdecode(file.as_py()) for file in self.table["file"])
        sizes = pa.array([_size(file if is_remote(file) else join(self.folder, file)) for file in files], pa.int64())
        return digest([*self.table["captions"].chunks, sizes])

    def media(self, item: Mapping) -> dict:
        file = os.fsdecode(item["file"])
        return {"path": file if is_remote(file) else join(self.folder, file), "bytes": None}

    def captions(self, item: Mapping) -> list[str]:
        return item["captions"] or []

    def stamp(self, item: Mapping) -> list[Any] | None:
        return file_version(self.media(item)["path"])

    def name(self, row: int, item: Mapping) -> str:
        return self.media(item)["path"]


class HubRows(MediaRows):
    """Rows of a `datasets.Dataset`, its media column not decoded; `caption_path` are keys that lead to the caption."""

    def __init__(self, request: DataRequest, table: Any, media_column: str, caption_path: tuple[str, ...] | None):
        wanted = {media_column, "__key__", "__url__", *(caption_path or ())[:1]}
        super().__init__(request, table.select_columns([c for c in table.column_names if c in wanted]))
        self.media_column, self.caption_path = media_column, caption_path

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.table[row]

    def media(self, item: Mapping) -> dict:
        return item[self.media_column]

    def stamp(self, item: Mapping) -> str | None:
        return getattr(self.table, "_fingerprint", None)

    def captions(self, item: Mapping) -> list[str] | None:
        value = item if self.caption_path is not None else None
        for key in self.caption_path or ():
            value = value.get(key) if isinstance(value, Mapping) else None
        return caption_texts(value)

    def content(self) -> str | None:
        """The captions alone: of the files no size is told."""
        return None if self.caption_path is None else _digest_of(map(self.captions, self._caption_items()))

    def _caption_items(self) -> Iterator[Mapping]:
        if self.caption_path is None:
            return itertools.repeat({}, len(self))
        name = self.caption_path[0]
        batches = self.table.select_columns([name]).iter(batch_size=1000)  # row by row takes a hundred times as long
        return ({name: value} for batch in batches for value in batch[name])

    def name(self, row: int, item: Mapping) -> str:
        path = (item[self.media_column] or {}).get("path") or item.get("__key__") or f"row {row}"
        url = item.get("__url__")
        return f"{os.path.basename(url)}/{path}" if url else path
