"""WebDataset tars, read in place: only their headers when they are opened, and of a sample what it needs."""

import logging
import os
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..text_files import decode_text, find_name, parse_json
from .columns import CAPTION_COLUMNS, DataRequest, caption_texts
from .faults import UnusableItem, is_remote, unusable
from .remote import file_version, read_part
from .rows import NO_CAPTION, MediaRows, digest, examples
from .shards import HEADER, field_of, group, is_header
from .tar_index import read_tars

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # samples whose json is read first, to see which keys there are
_Places = list[tuple[str, str | None]]  # of captions: a field, and the key in its json, or None in a text file


class Tar(NamedTuple):
    """A tar that was opened."""

    path: str
    version: Any  # as `file_version` told it then

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of one of its files; `UnusableItem` if the tar is no longer as it was."""
        try:  # with the header before them, which tells whether they are still the file's
            data = read_part(self.path, offset - HEADER, size + HEADER)
            changed = not is_remote(self.path) and file_version(self.path) != self.version
        except (OSError, MemoryError) as error:
            raise unusable(error, self.path, "its tar") from error
        if len(data) < size + HEADER:
            raise UnusableItem("its tar has become shorter since it was opened")
        if changed or not is_header(data[:HEADER], size):
            raise UnusableItem("its tar has changed since it was opened")
        return data[HEADER:]


class TarIndex:
    """Where the samples of a set of tars are, from their headers alone.

    `skipped` has tars and files that are of no use, with the reason.
    """

    def __init__(self, request: DataRequest, paths: list[str]):
        self.tars: list[Tar] = []
        self.names: list[pa.Array] = []  # of the samples' videos or images, as chunks of Arrow
        self.shards = array("i")  # the number of each sample's tar
        # row, offset and size of one file after the other, by field; of the videos or images by "media"
        self.places = {"media": array("q")}
        self.others: set[str] = set()  # fields of all files, in samples or not
        self.skipped: dict[str, str] = {}
        for shard, (path, (members, problem, version)) in enumerate(zip(paths, read_tars(paths), strict=True)):
            self.tars.append(Tar(path, version))
            if problem:
                self.skipped[path] = problem
            self.others.update(field_of(member.name) for member in members)
            samples, left = group(members, request.kind, request.media_column and request.media_column.lower())
            self.skipped |= {f"{os.path.basename(path)}/{name}": reason for name, reason in left.items()}
            for sample in samples:
                for name, member in {"media": sample.media, **sample.fields}.items():
                    self.places.setdefault(name, array("q")).extend((len(self.shards), member.offset, member.size))
                self.shards.append(shard)
            self.names.append(pa.array([sample.media.name for sample in samples], pa.string()))

    def table(self, fields: Iterable[str]) -> pa.Table:
        """A row for each sample: `shard`, `name`, and `offset` and `size` of the media and of each of the fields.

        Both are -1 where there is no such file.
        """
        columns: dict[str, Any] = {"shard": np.asarray(self.shards), "name": pa.chunked_array(self.names, pa.string())}
        for name in ("media", *fields):
            rows, offsets, sizes = np.asarray(self.places[name]).reshape(-1, 3).T
            for column, values in ((f"{name} offset", offsets), (f"{name} size", sizes)):
                columns[column] = np.full(len(self.shards), -1, dtype=np.int64)
                columns[column][rows] = values
        return pa.table(columns).combine_chunks()


class TarRows(MediaRows):
    """Samples of tars, read in place; of `caption_places`, the first that has a caption counts."""

    def __init__(self, request: DataRequest, index: TarIndex, caption_places: _Places):
        fields = dict.fromkeys(name for name, _ in caption_places)
        super().__init__(request, index.table(fields), index.skipped)
        self.tars, self.caption_places = index.tars, caption_places
        self.far_captions = bool(caption_places) and any(is_remote(tar.path) for tar in self.tars)
        if self.kind.needs_caption:
            has_one = np.any([self.table[f"{name} offset"].to_numpy() >= 0 for name in fields], axis=0)
            for row in np.flatnonzero(~has_one).tolist():
                self.skipped[self.name(row, self[row])] = NO_CAPTION
            self.table = self.table.filter(pa.array(has_one)).combine_chunks()

    def order(self) -> str:
        paths = pa.array([os.path.basename(tar.path) for tar in self.tars])
        return digest([paths.take(pa.array(self.table["shard"])), *self.table["name"].chunks])

    def content(self) -> str:
        sizes = [name for name in self.table.column_names if name.endswith(" size")]
        return digest([chunk for name in sizes for chunk in self.table[name].chunks])

    def _read(self, item: Mapping, name: str) -> bytes | None:
        offset, size = item[f"{name} offset"], item[f"{name} size"]
        return None if offset < 0 else self.tars[item["shard"]].read(offset, size)

    def media(self, item: Mapping) -> dict:
        return {"path": item["name"], "bytes": self._read(item, "media")}

    def stamp(self, item: Mapping) -> Any:
        return self.tars[item["shard"]].version

    def captions(self, item: Mapping) -> list[str] | None:
        texts: list[str] | None = []
        for name, key in self.caption_places:
            data = self._read(item, name)
            if data is None:
                continue
            value = _read_value(data, name, self.tars[item["shard"]].path)
            if key is not None:
                value = value.get(key) if isinstance(value, Mapping) else None
            texts = caption_texts(value)
            if texts:
                break
        return texts

    def name(self, row: int, item: Mapping) -> str:
        return f"{os.path.basename(self.tars[item['shard']].path)}/{item['name']}"


def open_tars(request: DataRequest, paths: list[str]) -> TarRows:
    """The samples of the tars at `paths`; `ValueError` if none can be read, or none holds what is needed."""
    index, source, kind = TarIndex(request, paths), request.source, request.kind
    if index.shards:
        return TarRows(request, index, _find_captions(index, request))
    if not index.others:
        raise ValueError(f"None of the {len(paths)} tars of {source!r} can be read:{examples(index.skipped, 1)}")
    fields = sorted(index.others - {""})
    if request.media_column is not None:
        raise request.no_media_column(repr(source), fields)
    if of_kind := [name for name in fields if f".{name}".endswith(kind.extensions)]:
        raise request.several_media_columns(of_kind)
    broken = examples({path: index.skipped[path] for path in paths if path in index.skipped})
    raise ValueError(f"The tars {source!r} hold no {kind.name} files ({kind.extensions}); they hold {fields}.{broken}")


def _find_captions(index: TarIndex, request: DataRequest) -> _Places:
    """Where captions may be: in text files, and in json; nowhere if an image set has none."""
    asked = request.caption_column
    fields = list(index.places)[1:]
    json_fields = {name: _JsonKeys(index, name) for name in fields if name.endswith("json")}
    files, wanted = list(CAPTION_COLUMNS), {"json": list(CAPTION_COLUMNS)}
    if asked is not None:
        outer, _, inner = asked.rpartition(".")
        files, wanted = [asked.lower()], {"json": [asked]}
        wanted.setdefault(outer.lower(), []).append(inner)
    in_json = [(json_fields[name], keys) for name, keys in wanted.items() if name in json_fields]
    found: _Places = [(name, None) for name in files if name in fields and name not in json_fields]
    found += [place for keys, names in in_json for place in keys.find(names)]
    found = found or next(filter(None, (keys.read_on(names) for keys, names in in_json)), [])
    broken = {name: reason for keys in json_fields.values() for name, reason in keys.broken.items()}
    unread = f"\nOf the json files these cannot be read:{examples(broken)}" if broken else ""
    if not found and (asked is not None or request.kind.needs_caption):
        columns = sorted(index.others - {"", *json_fields})
        columns += [f"{name}.{key}" for name, keys in json_fields.items() for key in keys.keys]
        raise request.no_caption_column(repr(request.source), columns, unread)
    if not found and broken:
        logger.warning("No captions were found beside the images of %r.%s", request.source, unread)
    return found[: None if asked is None else 1]


class _JsonKeys:
    """The keys under which the samples' json of one field has text."""

    def __init__(self, index: TarIndex, name: str):
        self.index, self.name = index, name
        self.keys: dict[str, None] = {}  # those that were found so far, in the order in which they were
        self.broken: dict[str, str] = {}  # unreadable json, by sample; it is skipped and counted when its turn comes
        self._places = np.asarray(index.places[name]).reshape(-1, 3)
        self._first = np.unique(np.linspace(0, len(self._places) - 1, _LOOKED_AT).astype(int)).tolist()
        for at in self._first:
            self._look_at(at)

    def find(self, wanted: Iterable[str]) -> _Places:
        """The places where text stands under the wanted keys, as these are written there."""
        keys = [find_name(self.keys, name) for name in wanted if name]
        return list(dict.fromkeys((self.name, key) for key in keys if key is not None))

    def read_on(self, wanted: Iterable[str]) -> _Places:
        """Read the json of all samples until one has a wanted key, and say which one that is."""
        first, before = set(self._first), list(self.keys)
        for at in range(len(self._places)):
            if at in first:
                continue
            self._look_at(at)
            if found := self.find(wanted):
                logger.warning(
                    "Captions are taken from %r in the %s files: %s has it. None of the first %d looked at does; "
                    "their keys are %s. Samples without it count as having no caption.",
                    found[0][1], self.name, self._sample(at), len(first), before,
                )  # fmt: skip
                return found
        return []

    def _look_at(self, at: int) -> None:
        row, offset, size = self._places[at].tolist()
        tar = self.index.tars[self.index.shards[row]]
        try:
            value = _read_value(tar.read(offset, size), self.name, tar.path)
        except UnusableItem as reason:
            self.broken[self._sample(at)] = str(reason)
            return
        if isinstance(value, Mapping):
            self.keys |= {key: None for key, entry in value.items() if caption_texts(entry)}

    def _sample(self, at: int) -> str:
        """The name of a sample, for messages."""
        row = int(self._places[at, 0])
        shard = os.path.basename(self.index.tars[self.index.shards[row]].path)
        return f"{shard}/{pa.chunked_array(self.index.names, pa.string())[row].as_py()}"


def _read_value(data: bytes, name: str, path: str) -> Any:
    """What a text or json file of a sample holds."""
    text = decode_text(data)
    if text.broken_lines:
        raise UnusableItem(f"its {name} is neither in UTF-8 nor in Windows-1252")
    text.tell_guess(f"A {name} file in {path}")
    try:
        return parse_json(text.content) if name.endswith("json") else text.content
    except ValueError as error:
        raise UnusableItem(f"its {name} is broken ({error})") from error
