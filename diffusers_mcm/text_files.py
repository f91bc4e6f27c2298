"""Text that people hand over (prompts, captions, tables, cards), in whatever encoding and notation it was written."""

import codecs
import csv
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
_Record = tuple[int, list[str], str | None]  # of csv: its line, its cells and what is wrong with it
_BYTE_ORDER_MARKS = {  # UTF-32's first, for they begin with UTF-16's
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_told: set[str] = set()  # names of the texts of which it was said that their encoding is a guess


@dataclass(frozen=True)
class Text:
    """A decoded text; U+FFFD stands for bytes that fit no encoding that is known here."""

    content: str  # its lines ended by a line feed, without a byte order mark
    encoding: str  # in Python's name
    broken_lines: tuple[int, ...] = ()  # numbers, from 1, of those that hold such bytes

    def checked(self, name: str) -> str:
        """The content, with `tell_guess`; `ValueError` that names the file and its first broken line if it has one."""
        if self.broken_lines:
            raise ValueError(
                f"{name}, line {self.broken_lines[0]}: expected text in UTF-8, UTF-16 or Windows-1252, got other "
                "bytes. Save the file as UTF-8."
            )
        self.tell_guess(name)
        return self.content

    def tell_guess(self, name: str) -> None:
        """Warn once of each file that is read as Windows-1252: nothing in it says so. What else is read is certain."""
        if self.encoding == "cp1252" and name not in _told:
            _told.add(name)
            lines = enumerate(self.content.split("\n"), 1)
            number, line = next((number, line[:100]) for number, line in lines if not line.isascii())
            logger.warning(
                "%s is not in UTF-8 and is read as Windows-1252. If line %d should not read %r, save it as UTF-8.",
                name, number, line,
            )  # fmt: skip


def decode_text(data: bytes) -> Text:
    """Decode UTF-8, UTF-16 and UTF-32 with a byte order mark, UTF-8 and UTF-16 without one, and Windows-1252.

    What Latin-1 can write Windows-1252 reads alike. Bytes that could be several encodings are not guessed at: they
    are in `broken_lines`.
    """
    for encoding, marks in _BYTE_ORDER_MARKS.items():
        if data.startswith(marks):
            return _decode(data, encoding)
    start = data[:4096]
    if start.count(0) > len(start) // 4:  # ASCII in UTF-16 has a zero in every character
        return _decode(data, "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be")
    text = _decode(data, "utf-8")
    return text.broken_lines and _decode_western(data) or text


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in any encoding of `decode_text`; `ValueError` that names file and line if it is in none."""
    return decode_text(Path(path).read_bytes()).checked(os.fspath(path))


def _decode(data: bytes, encoding: str) -> Text:
    try:
        content, known = data.decode(encoding), True
    except UnicodeDecodeError:
        content, known = data.decode(encoding, "replace"), False
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    broken = (number for number, line in enumerate(content.split("\n"), 1) if not known and "\ufffd" in line)
    return Text(content, encoding, tuple(broken))


def _decode_western(data: bytes) -> Text | None:
    """Windows-1252, or None where more lines speak against it than for it; those that do are broken."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    telling = [(number, line) for number, line in enumerate(lines, 1) if not line.isascii()]
    broken = {number for number, line in telling if not _may_be_western(line)}
    if any(not _decode(line, "utf-8").broken_lines for _, line in telling) or 2 * len(broken) >= len(telling):
        return None
    content = "\n".join(
        line.decode("utf-8", "replace") if number in broken else line.decode("cp1252")
        for number, line in enumerate(lines, 1)
    )
    return Text(content, "cp1252", tuple(sorted(broken)))


def _may_be_western(line: bytes) -> bool:
    """Whether this may be Windows-1252: no byte that it lacks, and no words wholly of letters beyond ASCII."""
    runs = re.findall(rb"[\x80-\xff]{4,}", line)  # Cyrillic, Greek and Chinese words are such, French ones are not
    return not re.search(rb"[\x81\x8d\x8f\x90\x9d]", line) and all(len(set(run)) == 1 for run in runs)


class Row(NamedTuple):
    """One row of a table: its values by column, or the problem with it."""

    line: int  # in the file, from 1; where there are no lines its place in the table
    values: dict[str, Any]
    problem: str | None = None


class Table(NamedTuple):
    """A table of which the rows are read while they are asked for."""

    columns: list[str]  # of csv as in its header; of JSON those of the first rows
    rows: Iterator[Row]
    unit: str = "line"  # what `Row.line` counts: "line", or "row"
    all_columns: Callable[[], list[str]] | None = None  # of JSON, those of all rows; None where `columns` has them all


def plain_name(name: str) -> str:
    """A column's name without what people write in different ways: case, spaces, dashes and underscores."""
    return re.sub(r"[\W_]+", "", name.casefold())


def find_name(names: Collection[str], wanted: str) -> str | None:
    """The name among `names` that is `wanted`, or else is written a little differently; None if there is none."""
    if wanted in names:
        return wanted
    return next((name for name in names if plain_name(name) == plain_name(wanted)), None)


def read_table(text: str, suffix: str, known: Collection[str]) -> Table:
    """The rows of a table in csv (`.csv`, `.tsv`, any of `DELIMITERS`), JSON lines (`.jsonl`) or JSON (`.json`).

    Of csv the delimiter is the one with which the header has most of the `known` names of columns. A bad row is a
    `Row` with its problem; `ValueError`, with line and column, if the whole is not JSON.
    """
    if suffix in (".csv", ".tsv"):
        return _read_csv(text, known)
    try:
        whole, error = parse_json(text), None
    except ValueError as reason:
        whole, error = None, reason
    if suffix == ".json" and isinstance(whole, dict):
        whole = [whole]
    unit = "row" if isinstance(whole, list) else "line"  # of JSON lines, which some people call .json

    def read_rows() -> Iterator[Row]:
        return map(_object_row, itertools.count(1), whole) if isinstance(whole, list) else _json_lines(text)

    def columns(rows: Iterable[Row]) -> list[str]:
        return list(dict.fromkeys(key for row in rows for key in row.values))

    first = list(itertools.islice(read_rows(), 100))
    if suffix == ".json" and error is not None and all(row.problem for row in first):
        raise error
    return Table(columns(first), read_rows(), unit, (lambda: columns(read_rows())) if len(first) == 100 else None)


def parse_json(text: str) -> Any:
    """The value, its numbers as they are written (`7`, `1e5`) and what is not a number as None; `ValueError` else."""
    try:
        # Tabs and line ends within a text are no reason to lose it: not strict.
        return json.loads(text, strict=False, parse_int=str, parse_float=str, parse_constant=lambda name: None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object_row(line: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(line, value)
    return Row(line, {}, f"expected an object, got {json.dumps(value, ensure_ascii=False)[:60]}")


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` also splits where a text holds U+2028
        if not line.strip():
            continue
        try:
            yield _object_row(number, parse_json(line))
        except ValueError as error:
            yield Row(number, {}, f"it is not JSON ({error})")


def _read_csv(text: str, known: Collection[str]) -> Table:
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    said = re.fullmatch(r'"?sep=(.)"?', lines[first].strip("\ufeff ")) if first < len(lines) else None  # Excel's
    first += bool(said)
    delimiter = said[1] if said else _find_delimiter(lines[first : first + 20], known)
    records = _csv_records(lines, first, delimiter)
    _, header, _ = next(records, (0, [], None))
    names = [cell.strip() for cell in header]
    while names and not names[-1]:  # a spreadsheet's empty columns
        names.pop()
    return Table(names, (_csv_row(record, names, delimiter) for record in records))


def _csv_row(record: _Record, names: list[str], delimiter: str) -> Row:
    (line, cells, problem), width = record, len(names)
    if any(cell.strip() for cell in cells[width:]):
        problem = problem or (
            f"it has {len(cells)} cells where the header has {width}; a text that holds {delimiter!r} needs quotes"
        )
    values = dict(zip(reversed(names), reversed((cells + [""] * width)[:width])))  # of two equal names the first
    values.pop("", None)
    return Row(line, values, problem)


def _find_delimiter(lines: list[str], known: Collection[str]) -> str:
    plain = {plain_name(name) for name in known}
    headers = {each: next(_csv_records(lines, 0, each), (0, [], None))[1] for each in DELIMITERS}
    return max(headers, key=lambda each: (sum(plain_name(c) in plain for c in headers[each]), len(headers[each])))


def _csv_records(lines: list[str], first: int, delimiter: str) -> Iterator[_Record]:
    """Records of csv, from line number `first` (counted from 0) on, blank ones left out.

    A quote that is never closed, or that others stand in, would swallow the rows that follow: such a line is read as
    if it held no quoting, or is a record with a problem, and the next line begins a new record.
    """
    position, width, reader = first, None, None
    while position < len(lines):
        if reader is None:
            base, rest = position, (lines[number] + "\n" for number in range(position, len(lines)))
            reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True)
        start = position
        try:
            cells, problem = next(reader, []), None
            position = base + reader.line_num
        except csv.Error as error:
            position, reader = start + 1, None
            cells = lines[start].split(delimiter)
            literal = lines[start].count('"') % 2 == 0 and width in (None, len(cells))
            problem = None if literal else f"its quotes do not match ({error}); a quote within a text is written twice"
        if any(cell.strip() for cell in cells):
            width = width or len(cells)
            yield start + 1, cells, problem
