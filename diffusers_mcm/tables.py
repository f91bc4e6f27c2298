"""Tables of results in markdown, and the sections of documents that hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import write_text


def table(rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str]) -> str:
    """A markdown table, one row per label."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *(cells.get(column, "–") for column in columns)] for label, cells in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_section(path: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- mark -->` and `<!-- /mark -->` of a file."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    content = path.read_text(encoding="utf-8")
    if content.count(opening) != 1 or content.count(closing) != 1 or content.index(opening) > content.index(closing):
        raise ValueError(f"expected one {opening} and then one {closing} in {path}")
    before, after = content.split(opening)[0], content.split(closing)[1]
    write_text(path, f"{before}{opening}\n{text.strip()}\n{closing}{after}")
