"""Where training data comes from: a folder, WebDataset tars or the Hub."""

import glob
import logging
import os
from collections.abc import Mapping

from .columns import CAPTION_COLUMNS, IMAGES, VIDEOS, MediaKind, caption_texts, no_caption_column
from .rows import HubRows, MediaRows, examples

__all__ = ["IMAGES", "VIDEOS", "MediaKind", "MediaRows", "open_rows"]

logger = logging.getLogger(__name__)


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Reading training data needs the package `datasets`: pip install 'diffusers-mcm[train]'"
        ) from error
    return datasets


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
        source: a folder with metadata (`metadata.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet`; captions optional for
            images) or such a table itself, a folder or a glob of WebDataset tars, or a Hub data set id. A local path
            wins over a Hub id.
        kind: `VIDEOS` or `IMAGES`.
        split: a split of the Hub data set, or a subfolder; "train" is the whole folder if it has no such subfolder.
        media_column, caption_column: names of the columns, if they are not to be detected. A caption inside
            the `json` of a WebDataset may be written `json.caption`.
        config_name, revision: of a Hub data set.

    Rows that can be seen to be of no use are left out, kept in `skipped` with the reason, and warned of.

    Raises:
        ValueError: if there is nothing there that can be used, or no column fits; the message names the file and
            lists the columns.
    """
    source = os.fspath(source)
    datasets = _import_datasets()  # and with it Arrow, which the other modules keep rows in
    rows = _open_local(source, kind, split, media_column, caption_column)
    if rows is None:
        rows = _open_hub(datasets, source, kind, split, media_column, caption_column, config_name, revision)
    if not len(rows):
        raise ValueError(f"The {kind.name} data {source!r} has no rows in its split {split!r}.")
    if rows.skipped:
        logger.warning(
            "Items of no use in the %s data %r: %d are skipped, %d are left. For example%s",
            kind.name, source, len(rows.skipped), len(rows), examples(rows.skipped),
        )  # fmt: skip
    return rows


def _open_local(
    source: str, kind: MediaKind, split: str, media_column: str | None, caption_column: str | None
) -> MediaRows | None:
    """The rows of a folder, a table or tars of this machine; None if `source` is not there, or needs `datasets`."""
    from .folders import TABLE_SUFFIXES, open_folder, walk
    from .shards import TAR_SUFFIXES
    from .tars import open_tars

    columns = (media_column, caption_column)
    if os.path.isdir(source):
        folder = _split_folder(source, kind, split)
        files = walk(folder)
        tars = [os.path.join(folder, path) for path in files if path.lower().endswith(TAR_SUFFIXES)]
        if tars:
            return open_tars(source, tars, kind, *columns)
        if any(path.lower().endswith(".zip") for path in files):
            return None
        return open_folder(source, folder, files, kind, *columns)
    if source.lower().endswith(TABLE_SUFFIXES) and os.path.isfile(source):
        folder, table = os.path.split(os.path.abspath(source))
        return open_folder(source, folder, walk(folder), kind, *columns, metadata=[table])
    if source.lower().endswith(TAR_SUFFIXES) or glob.has_magic(source):
        tars = sorted(path for path in glob.glob(source, recursive=True) if path.lower().endswith(TAR_SUFFIXES))
        tars = [source] if os.path.isfile(source) else tars
        if not tars:
            raise ValueError(f"No .tar file matches {source!r}.")
        return open_tars(source, tars, kind, *columns)
    return None


def _split_folder(source: str, kind: MediaKind, split: str) -> str:
    """The subfolder named like the split; the folder itself for "train" without one, or if its metadata rules all."""
    from .folders import is_metadata

    entries = list(os.scandir(source))
    if split == "train" and any(is_metadata(entry.name) for entry in entries):
        return source
    folder = os.path.join(source, split)
    if os.path.isdir(folder):
        return folder
    if split == "train":
        return source
    found = sorted(entry.name for entry in entries if entry.is_dir())
    raise ValueError(f"The {kind.name} data {source!r} has no subfolder {split!r} for that split; found {found}.")


# -- through `datasets` -----------------------------------------------------------------------------------------------


def _open_hub(
    datasets,
    source: str,
    kind: MediaKind,
    split: str,
    media_column: str | None,
    caption_column: str | None,
    config_name: str | None,
    revision: str | None,
) -> HubRows:
    """A Hub data set, or a folder with zip archives, which `datasets` opens."""
    table = _load(datasets, source, kind, split, config_name, revision)
    media_column = _find_media_column(datasets, table.features, source, kind, media_column)
    table = table.cast_column(media_column, getattr(datasets, kind.feature)(decode=False))
    caption_path = _find_caption(
        datasets, _features_with_json_keys(datasets, table, caption_column), source, kind, caption_column
    )
    return HubRows(source, kind, table, media_column, caption_path)


def _load(datasets, source: str, kind: MediaKind, split: str, config_name: str | None, revision: str | None):
    folder = _split_folder(source, kind, split) if os.path.isdir(source) else None
    message = f"The {kind.name} data {source!r} is neither a local folder, nor .tar files, nor a Hub data set id"
    nowhere = os.path.exists(source) or os.path.isabs(source) or source.startswith(".") or source.count("/") > 1
    if folder is None and nowhere:
        raise ValueError(f"{message} (owner/name).")
    try:
        if folder is not None:  # by hand: `datasets` would put `test_1.mp4` into a test split
            files = {split: os.path.join(folder, "**")}
            return datasets.load_dataset(kind.builder, data_files=files, split=split)
        return datasets.load_dataset(source, config_name, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(f"{message} that can be reached: {error}") from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        reason = error.__cause__ or error  # what stopped the library's builder
        raise ValueError(f"The {kind.name} data {source!r} cannot be read by `datasets`: {reason}") from error


def _features_with_json_keys(datasets, table, asked: str | None) -> dict:
    """The table's features, with a json column opened up into the keys that its rows have.

    The first rows are looked at, and the others too until one has a caption, if none of those has.
    """
    features = dict(table.features)
    wanted = CAPTION_COLUMNS if asked is None else (asked, asked.partition(".")[2])
    for name in [name for name, feature in features.items() if isinstance(feature, datasets.Json)]:
        texts, others = set(), set()
        for batch in table.select_columns([name]).iter(batch_size=100):
            for value in batch[name]:
                entries = value.items() if isinstance(value, Mapping) else ()
                texts |= {key for key, entry in entries if caption_texts(entry)}
                others |= {key for key, entry in entries}
            if texts & set(wanted) or any(_is_text(datasets, features.get(column)) for column in wanted):
                break
        features[name] = {
            key: datasets.Value("string") if key in texts else datasets.Json() for key in sorted(texts | others)
        }
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
        raise ValueError(f"{source!r} has several {kind.name} columns, {typed}: say which with {kind.ask_for_media}.")
    found = [name for name in kind.columns if name in features]
    if kind.name in typed or (not typed and found):
        return kind.name if kind.name in typed else found[0]
    if not typed:
        raise ValueError(
            f"No {kind.name} column found in {source!r}: none is of type {kind.feature} or named one of "
            f"{list(kind.columns)}; its columns are {columns}. Name it with {kind.ask_for_media}."
        )
    return typed[0]


def _is_text(datasets, feature) -> bool:
    """Whether a feature is text, or a list of texts."""
    if isinstance(feature, datasets.List):
        feature = feature.feature
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
        raise ValueError(no_caption_column(repr(source), columns, kind))
    return None
