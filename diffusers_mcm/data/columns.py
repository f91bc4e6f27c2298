"""What data is asked for, which of its columns holds the files and which the captions, and what a caption is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..text_files import find_name

#: Names under which captions are looked for, in this order, first among the columns, then inside `json`.
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "description")
_FILE_COLUMNS = ("file_name", "{0}_file_name", "{0}", "{0}_path", "{0}_file", "file_path", "path", "file", "clip_path")


@dataclass(frozen=True)
class MediaKind:
    """What differs between video and image data."""

    name: str  # also the canonical column, and what `datasets` calls its feature type and its loader of folders
    columns: tuple[str, ...]  # names under which the files are looked for in a table of `datasets`, if none is typed
    extensions: tuple[str, ...]
    needs_caption: bool
    caption_flag: str | None  # of the training script, that of files is `--{name}_column`; None: columns have no flags
    loose: bool = False  # whether archives are left alone, and a row may name a folder of frames

    @property
    def file_columns(self) -> tuple[str, ...]:
        """Names under which a metadata file may give the files, in the order in which they are looked for."""
        return tuple(name.format(self.name) for name in _FILE_COLUMNS)

    @property
    def ask_for_media(self) -> str:
        """The argument that names the column of the files, in Python and on the command line."""
        return f"{self.name}_column (--{self.name}_column)"


VIDEOS = MediaKind(
    name="video",
    columns=("video", "mp4", "webm", "mkv", "mov", "avi", "m4v"),
    extensions=tuple(".mp4 .webm .mkv .mov .avi .m4v .mpeg .mpg .ts .m2ts .mts .wmv .flv .3gp .ogv".split()),
    needs_caption=True,
    caption_flag="--caption_column",
)
IMAGES = MediaKind(
    name="image",
    columns=("image", "jpg", "jpeg", "png", "webp"),
    extensions=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    needs_caption=False,
    caption_flag="--image_caption_column",
)


def caption_texts(value: Any) -> list[str] | None:
    """The captions that a value holds: a text or a list of several; None if it is something else.

    They are stripped, and empty ones left out. Whatever the text is, it stays as it is written: "NaN", "007", "true".
    """
    if value is None:
        return []
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode().strip()  # without halves of surrogate pairs
        return [text] if text else []
    if isinstance(value, Sequence) and not isinstance(value, bytes) and all(isinstance(v, str) for v in value):
        return [text for entry in value for text in caption_texts(entry) or ()]
    return None


@dataclass(frozen=True)
class DataRequest:
    """Which videos or images somebody asks for.

    The source is a folder with metadata (`metadata.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet`; captions optional
    for images) or such a table itself, a folder or a glob of WebDataset tars, the address of one of these, or a Hub
    data set id. A local path wins over a Hub id. Columns of tars are the samples' fields ("mp4"), and "json.caption"
    is a caption inside their json.
    """

    source: str
    kind: MediaKind
    split: str = (
        "train"  # of the Hub data set, or a subfolder; "train" is the whole folder if it has none of that name
    )
    media_column: str | None = None  # is detected, if it is not named
    caption_column: str | None = None  # likewise
    config_name: str | None = None  # of a Hub data set
    revision: str | None = None  # likewise
    extra_columns: tuple[str, ...] = ()  # of metadata tables, whose values `MediaRows.said` gives as well

    def no_media_column(self, name: str, columns: Collection[str]) -> ValueError:
        """The error that `name` lacks the column of the files that was asked for."""
        return ValueError(
            f"{name} has no {self.kind.name} column {self.media_column!r}; its columns are {list(columns)}."
        )

    def several_media_columns(self, columns: Collection[str]) -> ValueError:
        """The error that the source does not say which of several columns is meant."""
        return ValueError(
            f"{self.source!r} has several {self.kind.name} columns, {columns}: say which with "
            f"{self.kind.ask_for_media}."
        )

    def no_caption_column(self, name: str, columns: Collection[str], note: str = "") -> ValueError:
        """The error that `name` has no column of captions, or not the one that was asked for."""
        if (asked := self.caption_column) is not None:
            return ValueError(
                f"{name} has no caption column {asked!r} of text; its columns are {list(columns)}.{note}"
            )
        flag = self.kind.caption_flag
        way = f"Name it with caption_column ({flag})" if flag else "Rename it to one of those: no flag names it here"
        return ValueError(
            f"No caption column found in {name}: looked for {list(CAPTION_COLUMNS)}; its columns are {list(columns)}. "
            f"{way}.{note}"
        )


def find_file_column(columns: Sequence[str], name: str, request: DataRequest) -> str:
    """The column of the metadata file `name` that names the media files; `ValueError` if there is none or two."""
    kind, asked = request.kind, request.media_column
    wanted = kind.file_columns if asked is None else (asked, *(kind.file_columns if asked == kind.name else ()))
    found = _first_found(columns, wanted, name)
    if found is not None:
        return found
    if asked is not None:
        raise request.no_media_column(name, columns)
    if any(str(column).lower().endswith(kind.extensions) for column in columns):
        raise ValueError(
            f"{name} has no header: its first line is {list(columns)}. Put a line with the names of the columns above "
            "it, such as file_name,caption."
        )
    way = f"or name it with {kind.ask_for_media}"
    if kind.caption_flag is None:
        way = f"or another of {list(kind.file_columns[1:])}: no flag names it here"
    raise ValueError(
        f"{name} has no column that names the {kind.name} files; its columns are {list(columns)}. Call it file_name, "
        f"{way}."
    )


def find_caption_column(columns: Sequence[str], name: str, request: DataRequest) -> str | None:
    """The column of a metadata file that holds the captions; None if images have none. Else as `find_file_column`."""
    asked = request.caption_column
    found = _first_found(columns, CAPTION_COLUMNS if asked is None else (asked,), name)
    if found is None and (asked is not None or request.kind.needs_caption):
        raise request.no_caption_column(name, columns)
    return found


def _first_found(columns: Sequence[str], wanted: Sequence[str], name: str) -> str | None:
    names = [column for column in columns if isinstance(column, str)]
    found = next((column for one in wanted if (column := find_name(names, one)) is not None), None)
    if found is not None and names.count(found) > 1:
        raise ValueError(f"{name} has {names.count(found)} columns named {found!r}: rename all but one.")
    return found
