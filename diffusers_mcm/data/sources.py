"""Where training data comes from: a folder, WebDataset tars or the Hub, all through `datasets`."""

import glob
import itertools
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .images import UnusableItem

#: Names under which captions are looked for, in this order, first among the columns, then inside `json`.
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "description")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class MediaKind:
    """What differs between video and image data."""

    name: str  # also the canonical column
    builder: str  # the loader of `datasets` for a folder
    feature: str  # the feature type of `datasets`
    columns: tuple[str, ...]  # names under which the files are looked for if no column is typed
    extensions: tuple[str, ...]
    needs_caption: bool


VIDEOS = MediaKind(
    name="video",
    builder="videofolder",
    feature="Video",
    columns=("video", "mp4", "webm", "mkv", "mov", "avi", "m4v"),
    extensions=(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpeg"),
    needs_caption=True,
)
IMAGES = MediaKind(
    name="image",
    builder="imagefolder",
    feature="Image",
    columns=("image", "jpg", "jpeg", "png", "webp"),
    extensions=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    needs_caption=False,
)


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Reading training data needs the package `datasets`: pip install 'diffusers-mcm[train]'"
        ) from error
    return datasets


class MediaRows:
    """The rows of a data set: a file (path or bytes), its caption and its name.

    Args:
        source: what the user asked for, for messages.
        kind: `VIDEOS` or `IMAGES`.
        table: the `datasets.Dataset`, with its media column not decoded.
        media_column: the column with the files.
        caption_path: keys that lead to the caption, or None if there are no captions.
    """

    def __init__(self, source: str, kind: MediaKind, table, media_column: str, caption_path: tuple[str, ...] | None):
        self.source, self.kind = source, kind
        self.media_column, self.caption_path = media_column, caption_path
        wanted = {media_column, "__key__", "__url__", *(caption_path or ())[:1]}
        self.table = table.select_columns([c for c in table.column_names if c in wanted])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict:
        return self.table[row]

    def media(self, item: Mapping) -> dict:
        """The item's file: `{"path": …, "bytes": …}`."""
        return item[self.media_column]

    def caption(self, item: Mapping) -> str:
        """The item's caption, "" for an image without one.

        Raises:
            UnusableItem: if a video has no caption.
        """
        value = item if self.caption_path is not None else None
        for key in self.caption_path or ():
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value.strip():
            return value.strip()
        if self.kind.needs_caption:
            raise UnusableItem("it has no caption")
        return ""

    def captions(self) -> Iterator[str]:
        """The captions of all rows as `caption` gives them, less those that it refuses; no file is read."""
        if self.caption_path is None:
            yield from itertools.repeat(self.caption({}), len(self))
            return
        column = self.caption_path[0]
        for rows in self.table.select_columns([column]).iter(batch_size=1000):
            for value in rows[column]:
                try:
                    yield self.caption({column: value})
                except UnusableItem:
                    continue

    def name(self, row: int, item: Mapping) -> str:
        """How to name the item in a message: its path, within its tar if it lies in one."""
        path = (item[self.media_column] or {}).get("path") or item.get("__key__") or f"row {row}"
        url = item.get("__url__")
        return f"{os.path.basename(url)}/{path}" if url else path


def open_rows(
    source: str | os.PathLike,
    kind: MediaKind,
    split: str = "train",
    media_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> MediaRows:
    """Open a data set of videos or images.

    Args:
        source: a folder with `metadata.csv`, `.jsonl` or `.parquet` (captions optional for images), a folder or a
            glob of WebDataset tars, or a Hub data set id. A local path wins over a Hub id.
        kind: `VIDEOS` or `IMAGES`.
        split: a split of the Hub data set, or a subfolder; "train" is the whole folder if it has no such subfolder.
        media_column, caption_column: names of the columns, if they are not to be detected. A caption inside
            the `json` of a WebDataset may be written `json.caption`.
        config_name, revision: of a Hub data set.

    Raises:
        ValueError: if there is nothing there, or no column fits; the message lists the columns.
    """
    source = os.fspath(source)
    datasets = _import_datasets()
    table, is_folder = _load(datasets, source, kind, split, config_name, revision)
    media_column = _find_media_column(datasets, table.features, source, kind, media_column)
    feature = getattr(datasets, kind.feature)(decode=False)
    table = table.cast_column(media_column, feature)
    caption_path = _find_caption(datasets, _features_with_json_keys(datasets, table), source, kind, caption_column)
    if is_folder:
        table = _sorted_by_path(table, media_column, caption_path)
    if not len(table):
        raise ValueError(f"The {kind.name} data {source!r} has no rows in its split {split!r}.")
    return MediaRows(source, kind, table, media_column, caption_path)


def _load(datasets, source: str, kind: MediaKind, split: str, config_name: str | None, revision: str | None):
    """Returns the table and whether it was made from a folder of files."""
    if os.path.isdir(source):
        folder = _split_folder(source, kind, split)
        tars = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.tar"), recursive=True))
        if tars:
            return _load_tars(datasets, tars, source, kind, split), False
        _check_folder(folder, source, kind)
        files = {split: os.path.join(folder, "**")}  # by hand: `datasets` would put `test_1.mp4` into a test split
        return datasets.load_dataset(kind.builder, data_files=files, split=split), True
    if source.endswith(".tar") or glob.has_magic(source):
        tars = sorted(path for path in glob.glob(source, recursive=True) if path.endswith(".tar"))
        if not tars:
            raise ValueError(f"No .tar file matches {source!r}.")
        return _load_tars(datasets, tars, source, kind, split), False
    message = f"The {kind.name} data {source!r} is neither a local folder, nor .tar files, nor a Hub data set id"
    if os.path.exists(source) or os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
        raise ValueError(f"{message} (owner/name).")
    try:
        return datasets.load_dataset(source, config_name, split=split, revision=revision), False
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(f"{message} that can be reached: {error}") from error


def _load_tars(datasets, tars: list[str], source: str, kind: MediaKind, split: str):
    """WebDataset tars: the files of the kind, json and txt.

    The types are given instead of guessed by `datasets` from the first samples: the json of a later one may differ.
    """
    with tarfile.open(tars[0]) as tar:
        names = [os.path.basename(member.name) for member in itertools.islice(tar, 100) if member.isfile()]
    fields = sorted({name.split(".", 1)[1] for name in names if "." in name.lstrip(".")})
    types = {"json": datasets.Json(), "txt": datasets.Value("string")}
    types |= {extension[1:]: getattr(datasets, kind.feature)(decode=False) for extension in kind.extensions}
    features = {name: types.get(name.rsplit(".", 1)[-1].lower()) for name in fields}
    features = {name: feature for name, feature in features.items() if feature is not None}
    if not any(isinstance(feature, getattr(datasets, kind.feature)) for feature in features.values()):
        raise ValueError(f"The tars {source!r} hold no {kind.name} files ({kind.extensions}); they hold {fields}.")
    keys = {"__key__": datasets.Value("string"), "__url__": datasets.Value("string")}
    features = datasets.Features({**features, **keys})
    return datasets.load_dataset("webdataset", data_files={split: tars}, split=split, features=features)


def _split_folder(source: str, kind: MediaKind, split: str) -> str:
    """The subfolder named like the split; the folder itself for "train" without one, or if its metadata rules all."""
    if any(os.path.isfile(os.path.join(source, name)) for name in METADATA_FILES) and split == "train":
        return source
    folder = os.path.join(source, split)
    if os.path.isdir(folder):
        return folder
    if split == "train":
        return source
    found = sorted(entry.name for entry in os.scandir(source) if entry.is_dir())
    raise ValueError(f"The {kind.name} data {source!r} has no subfolder {split!r} for that split; found {found}.")


def _check_folder(folder: str, source: str, kind: MediaKind) -> None:
    """A folder must hold files of the kind, and videos their metadata; `datasets` would say less about it."""
    names = [name for _, _, files in os.walk(folder) for name in files]
    has_archive = any(name.lower().endswith(".zip") for name in names)
    if not has_archive and not any(name.lower().endswith(kind.extensions) for name in names):
        raise ValueError(
            f"The folder {source!r} holds no {kind.name} files ({', '.join(kind.extensions)}) and no .tar files."
        )
    if kind.needs_caption and not has_archive and not set(names) & set(METADATA_FILES):
        raise ValueError(
            f"The folder {source!r} holds {kind.name} files but no captions: add a metadata.csv or metadata.jsonl "
            "with the columns file_name and text."
        )


def _features_with_json_keys(datasets, table) -> dict:
    """The table's features, with a json column opened up into the keys that its first rows have."""
    features = dict(table.features)
    for name in [name for name, feature in features.items() if isinstance(feature, datasets.Json)]:
        values = [value for value in table.select_columns([name])[:100][name] if isinstance(value, Mapping)]
        texts = {key for value in values for key, entry in value.items() if isinstance(entry, str)}
        keys = sorted({key for value in values for key in value})
        features[name] = {key: datasets.Value("string") if key in texts else datasets.Json() for key in keys}
    return features


def _describe_columns(features: Mapping) -> list[str]:
    names = []
    for name, feature in features.items():
        nested = isinstance(feature, Mapping)
        names += [f"{name}.{key}" for key in feature] if nested else [name]
    return names


def _find_media_column(datasets, features: Mapping, source: str, kind: MediaKind, asked: str | None) -> str:
    columns = _describe_columns(features)
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{source!r} has no {kind.name} column {asked!r}; its columns are {columns}.")
        return asked
    typed = [name for name, feature in features.items() if isinstance(feature, getattr(datasets, kind.feature))]
    if len(typed) > 1 and kind.name not in typed:
        raise ValueError(f"{source!r} has several {kind.name} columns, {typed}: say which with {kind.name}_column.")
    found = [name for name in kind.columns if name in features]
    if kind.name in typed or (not typed and found):
        return kind.name if kind.name in typed else found[0]
    if not typed:
        raise ValueError(
            f"No {kind.name} column found in {source!r}: none is of type {kind.feature} or named one of "
            f"{list(kind.columns)}; its columns are {columns}. Name it with {kind.name}_column."
        )
    return typed[0]


def _is_text(datasets, feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")


def _find_caption(datasets, features: Mapping, source: str, kind: MediaKind, asked: str | None):
    """Keys that lead to the caption: `("text",)`, `("json", "caption")`, or None if an image set has none."""
    columns = _describe_columns(features)
    inside = features.get("json")
    inside = inside if isinstance(inside, Mapping) else {}
    if asked is not None:
        outer, _, inner = asked.partition(".")
        choices = [(asked,), ("json", asked), (outer, inner)]
    else:
        choices = [(name,) for name in CAPTION_COLUMNS] + [("json", name) for name in CAPTION_COLUMNS]
    for path in choices:
        feature = features.get(path[0])
        if len(path) == 2:
            feature = feature.get(path[1]) if isinstance(feature, Mapping) else None
        if feature is not None and _is_text(datasets, feature):
            return path
    if asked is not None:
        raise ValueError(f"{source!r} has no caption column {asked!r} of text; its columns are {columns}.")
    if kind.needs_caption:
        raise ValueError(
            f"No caption column found in {source!r}: looked for {list(CAPTION_COLUMNS)}; its columns are {columns}. "
            "Name it with caption_column."
        )
    return None


def _sorted_by_path(table, media_column: str, caption_path: tuple[str, ...] | None):
    """Rows in an order that depends on nothing but the files: several metadata files come in any order."""
    paths = [media.get("path") or "" for media in table[media_column]]
    captions = table[caption_path[0]] if caption_path else [""] * len(paths)
    order = sorted(range(len(paths)), key=lambda row: (paths[row], str(captions[row])))
    return table if order == list(range(len(paths))) else table.select(order)
