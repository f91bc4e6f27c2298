"""Folders of videos or images, with metadata tables that give the captions."""

import itertools
import json
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from ..text_files import Row, Table, decode_text, find_name, parse_json, read_table
from ..wording import first_names
from .columns import (
    CAPTION_COLUMNS,
    VIDEOS,
    DataRequest,
    MediaKind,
    caption_texts,
    find_caption_column,
    find_file_column,
)
from .faults import check_own_fault, is_remote
from .remote import join, open_file
from .rows import NO_CAPTION, NO_TEXT, FolderRows, examples

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
METADATA_FILES = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_FRAMES = (".png", ".jpg", ".jpeg")
_CHUNK = 8192  # rows that are Python objects at one time


def open_folder(request: DataRequest, folder: str, files: list[str], metadata: list[str] | None = None) -> FolderRows:
    """The rows of the metadata in a folder; without metadata its images.

    `files` are the paths in it, as `walk` gives them, and `metadata` those of tables; by default those named so. Where
    the folder is an address whose files cannot be listed, there are no `files`.
    `ValueError` if nothing there can be used; the message names the file, and the row if it is one.
    """
    metadata = _tables(request, folder, files) if metadata is None else metadata
    media = [path for path in files if path.lower().endswith(request.kind.extensions)]
    if not metadata:
        _check_captionless(request, files, media)
    _check_one_table_each(folder, metadata)
    reader = _MetadataReader(request, folder, files)
    table = _to_table(reader.read_all(metadata) if metadata else (_Found(path, []) for path in media))
    if not len(table):
        names = first_names(join(folder, path) for path in metadata)
        if not reader.skipped:
            raise ValueError(f"{names}: there are columns but no rows. Expected a row for each {request.kind.name}.")
        number = len(reader.skipped)
        raise ValueError(f"None of the {number} rows of {names} can be used, for example{examples(reader.skipped, 1)}")
    unnamed = _unnamed(request, folder, files, media, reader.used) if metadata else None
    if unnamed:
        logger.warning("%s: %s", folder, unnamed)
    return FolderRows(request, table, folder, reader.skipped, unnamed)


def _unnamed(
    request: DataRequest, folder: str, files: list[str], media: list[str], used: Collection[str]
) -> str | None:
    """A sentence on the files and folders of frames that no row names, by a path in the folder or a whole one."""
    whole = folder if is_remote(folder) else os.path.abspath(folder)
    frames = _frame_folders(request, files)
    there = [*(path for path in media if os.path.dirname(path) not in frames), *sorted(frames)]
    left = [path for path in there if path not in used]
    left = [path for path in left if os.path.dirname(path) not in used and join(whole, path) not in used]
    if left and not is_remote(folder):  # rows may name a file by another way to it
        really = _Whereabouts(whole)
        places = {really(path) for path in used}
        below = {path: os.path.dirname(path) for path in left if request.kind.loose}
        left = [path for path in left if really(path) not in places]
        left = [path for path in left if not below.get(path) or really(below[path]) not in places]
    if not left:
        return None
    return (
        f"{len(left)} of the {len(there)} {request.kind.name} files are not used, for no row of the metadata names "
        f"them: {first_names(left, 10)}"
    )


class _Whereabouts:
    """Where paths in a folder lie when the links to the folders they are in are followed; each is looked up once."""

    def __init__(self, folder: str):
        self.folder, self.known = folder, dict[str, str]()

    def __call__(self, path: str) -> str:
        """The path as it came where it can be none of a file."""
        above, name = os.path.split(os.path.normpath(os.path.join(self.folder, path)))
        if above not in self.known:
            try:
                self.known[above] = os.path.realpath(above)
            except ValueError:  # of a zero in it, and of what UTF-8 cannot write
                self.known[above] = above
        return os.path.join(self.known[above], name)


def _tables(request: DataRequest, folder: str, files: list[str]) -> list[str]:
    """The metadata tables in a folder; where it has folders of frames, not what is in these, which is of a video.

    A `metadata.json` of settings is left out where another table lies beside it, and always among samples.
    """
    frames = _frame_folders(request, files)
    tables = [path for path in files if is_metadata(path) and os.path.dirname(path) not in frames]
    each = Counter(map(os.path.dirname, tables))

    def is_table(path: str) -> bool:
        may_be_settings = request.kind.loose or each[os.path.dirname(path)] > 1
        return not may_be_settings or not holds_settings(join(folder, path), request.kind)

    return list(filter(is_table, tables))


def _frame_folders(request: DataRequest, files: list[str]) -> set[str]:
    """The folders of frames below a folder, if rows may name such: those that hold pictures, and no film."""
    if not request.kind.loose:
        return set()
    frames = {os.path.dirname(path) for path in files if path.lower().endswith(_FRAMES)}
    return frames - {os.path.dirname(path) for path in files if path.lower().endswith(VIDEOS.extensions)} - {""}


def is_metadata(path: str) -> bool:
    """Whether a file is a metadata table by its name."""
    return os.path.basename(path).lower() in METADATA_FILES


def holds_settings(path: str, kind: MediaKind) -> bool:
    """Whether a `metadata.json` is one object that names no files: what a tool was set to, and no table."""
    if os.path.basename(path).lower() != "metadata.json":
        return False
    with open_file(path) as file, suppress(ValueError):
        found = parse_json(decode_text(file.read()).content)
        text = json.dumps(found, ensure_ascii=False).lower()
        if not isinstance(found, dict) or any(f'{extension}"' in text for extension in kind.extensions):
            return False

        def under(columns: Collection[str]) -> list[Any]:
            return [found[name] for column in columns if (name := find_name(found, column)) is not None]

        # a group of settings may be called as a column is; one of numbers is a column as pandas writes it
        groups = [value is None or _is_group(value) for value in under(kind.file_columns)]
        return all(groups) and not any(isinstance(value, dict) for value in under(CAPTION_COLUMNS))
    return False


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and not (value and all(key.isdigit() for key in value))


def walk(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it and sorted; through links, but not what is hidden."""
    return sorted(_walk(folder, "", ()))


def _walk(folder: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    directory = os.path.join(folder, below)
    try:
        status = os.stat(directory)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to where it came from
            return
        entries = list(os.scandir(directory))
    except OSError as error:
        check_own_fault(error, directory)
        if not below:
            raise
        logger.warning("What lies in %s is not read: %s", directory, error)
        return
    for entry in entries:
        path = os.path.join(below, entry.name)
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if _is_folder(entry):
            yield from _walk(folder, path, (*above, here))
        else:
            yield path


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether this is a folder; a link that cannot be followed counts as a file, which cannot be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        check_own_fault(error, entry.path)
        return False


class _Found(NamedTuple):
    """What the row of a table names."""

    path: str  # relative to the folder
    captions: list[str]
    said: str | None = None  # in the extra columns, as JSON


class _MetadataReader:
    """Reads the rows of metadata tables, each a path relative to the folder and captions."""

    def __init__(self, request: DataRequest, folder: str, files: Collection[str]):
        self.request, self.folder, self.listed = request, folder, set(files)
        self.used: set[str] = set()  # the files that rows name
        self.skipped: dict[str, str] = {}  # rows and tables that are of no use, with the reason

    def read_all(self, metadata: list[str]) -> Iterator[_Found]:
        """The rows of tables, given by their paths relative to the folder."""
        for path in metadata:
            try:
                yield from self._read(path)
            except ValueError as error:  # one wrong table of many does not refuse the others
                if len(metadata) == 1:
                    raise
                self.skipped[join(self.folder, path)] = str(error)

    def _read(self, path: str) -> Iterator[_Found]:
        name = join(self.folder, path)
        named = (self.request.media_column, self.request.caption_column, *self.request.extra_columns)
        asked = [name for name in named if name is not None]
        table, damaged = open_table(name, (*self.request.kind.file_columns, *CAPTION_COLUMNS, *asked))
        if not table.columns:
            problem = next((f"; {table.unit} {row.line}: {row.problem}" for row in table.rows if row.problem), "")
            raise ValueError(
                f"{name} holds no rows{problem}. Expected the columns file_name and caption, and a row for each "
                f"{self.request.kind.name}."
            )
        columns = self._find_columns(table, name)
        for row in table.rows:
            yield from self._check(row, f"{name}, {table.unit} {row.line}", os.path.dirname(path), columns, damaged)

    def _find_columns(self, table: Table, name: str) -> tuple[str, str | None]:
        """The columns of the files and of the captions; of JSON more rows are looked at where the first have none."""

        def find(names: list[str]) -> tuple[str, str | None]:
            return find_file_column(names, name, self.request), find_caption_column(names, name, self.request)

        if table.all_columns is None:
            return find(table.columns)
        with suppress(ValueError):
            columns = find(table.columns)
            if columns[1] is not None:
                return columns
        return find(table.all_columns())

    def _check(
        self, row: Row, where: str, below: str, columns: tuple[str, str | None], damaged: bool
    ) -> Iterator[_Found]:
        """The row of a table, if it can be used."""
        file, caption = (row.values.get(column) if column else None for column in columns)
        if row.problem:
            self.skipped[where] = row.problem
        elif file is None or file == "":
            self.skipped[where] = "it names no file"
        elif not isinstance(file, str) or not file.strip():
            self.skipped[where] = f"expected a file name, got {file!r}"
        elif damaged and "\ufffd" in f"{file}{caption}":
            self.skipped[where] = "it holds bytes that are not UTF-8; save the table as UTF-8"
        else:
            path, captions = self._find(below, file.strip()), caption_texts(caption)
            self.used.add(path or file)
            if path is not None and (captions or not self.request.kind.needs_caption):
                yield _Found(path, captions or [], self._said(row))
                return
            reason = NO_CAPTION if captions is not None else NO_TEXT
            if path is None:
                reason = f"[Errno 2] No such file or directory; {where} names it"
            name = join(self.folder, os.path.join(below, file.strip()))
            self.skipped[where if name in self.skipped else name] = reason  # named twice, it counts twice

    def _said(self, row: Row) -> str | None:
        """What a row says in the extra columns, as JSON; None where none is asked for."""
        columns = {wanted: find_name(row.values, wanted) for wanted in self.request.extra_columns}
        said = {wanted: row.values[column] for wanted, column in columns.items() if column is not None}
        return json.dumps(said, default=str) if columns else None

    def _find(self, below: str, name: str) -> str | None:
        """The path of a file, relative to the folder, however its name is written; None if there is none."""
        path = os.path.join(below, name)
        if path in self.listed:
            return path
        if is_remote(name):
            return name
        slashed = name.replace("\\", "/")
        spellings = dict.fromkeys((name, slashed, *(unicodedata.normalize(f, slashed) for f in ("NFC", "NFD"))))
        paths = [os.path.normpath(os.path.join(below, spelling)) for spelling in spellings]
        found = next((path for path in paths if path in self.listed), None)
        if is_remote(self.folder):
            return found if self.listed else paths[0]  # what cannot be listed is looked for when it is read
        kinds = (stat.S_IFREG, stat.S_IFDIR) if self.request.kind.loose else (stat.S_IFREG,)
        return found or next((path for path in paths if _kind(os.path.join(self.folder, path)) in kinds), None)


def _to_table(rows: Iterator[_Found]) -> pa.Table:
    """The rows sorted by path (stably): several metadata tables come in an order that says nothing."""
    chunks: list[pa.Table] = []
    while not chunks or len(chunks[-1]) == _CHUNK:
        chunk = list(itertools.islice(rows, _CHUNK))
        files = pa.array([os.fsencode(row.path) for row in chunk], pa.binary())
        captions = pa.array([row.captions for row in chunk], pa.list_(pa.string()))
        said = pa.array([row.said for row in chunk], pa.string())
        chunks.append(pa.table({"file": files, "captions": captions, "said": said}))
    table = pa.concat_tables(chunks)
    return table.take(pa.compute.sort_indices(table, [("file", "ascending")])).combine_chunks()


def _kind(path: str) -> int | None:
    """Whether a path is a file, a folder or something else, as `stat` says it; None if it leads nowhere.

    Where the system cannot tell it is a `MachineError`; `os.path.isfile` and `os.path.isdir` say no then.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        check_own_fault(error, path)
        return None


def open_table(name: str, known: Collection[str]) -> tuple[Table, bool]:
    """A metadata table, and whether some of its bytes are no text."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".parquet":
        return _open_parquet(name), False
    with open_file(name) as file:
        text = decode_text(file.read())
    text.tell_guess(name)
    try:
        return read_table(text.content, suffix, known), bool(text.broken_lines)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def _open_parquet(name: str) -> Table:
    try:
        file = pa.parquet.ParquetFile(open_file(name) if is_remote(name) else name)
    except (pa.ArrowInvalid, OSError) as error:
        check_own_fault(error, name)
        raise ValueError(f"{name} cannot be read as parquet: {error}") from error

    schema = file.schema_arrow
    columns = [entry.name for entry in schema if not pa.types.is_binary(entry.type)]

    def rows() -> Iterator[Row]:
        number = 0
        try:
            batches = file.iter_batches(columns=columns)
            for number, values in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield Row(number, values)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            check_own_fault(error, name)
            yield Row(number + 1, {}, f"from here on the table cannot be read ({error})")

    return Table(columns, rows(), "row")


def _check_captionless(request: DataRequest, files: list[str], media: list[str]) -> None:
    """Without metadata there must be files of the kind, and no need for captions."""
    source, kind = request.source, request.kind
    if not media:
        raise ValueError(
            f"The folder {source!r} holds no {kind.name} files ({', '.join(kind.extensions)}) and no .tar files."
        )
    if kind.needs_caption or request.caption_column is not None:
        tables = [path for path in files if path.lower().endswith(TABLE_SUFFIXES)]
        instead = f" It holds {tables[0]}: rename that, or give its path instead of the folder's." if tables else ""
        raise ValueError(
            f"The folder {source!r} holds {kind.name} files but no captions: add a metadata.csv or metadata.jsonl "
            f"with the columns file_name and caption.{instead}"
        )


def _check_one_table_each(folder: str, metadata: list[str]) -> None:
    first: dict[str, str] = {}
    for below, name in map(os.path.split, metadata):
        if (other := first.setdefault(below, name)) != name:
            raise ValueError(f"The folder {os.path.join(folder, below)!r} holds {other} and {name}: keep one of them.")
