"""Where training data comes from: a folder, WebDataset tars or the Hub."""

import gc
import glob
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .columns import CAPTION_COLUMNS, IMAGES, VIDEOS, DataRequest, MediaKind, caption_texts
from .faults import is_remote
from .remote import expand, expand_braces, join, list_remote
from .rows import HubRows, MediaRows, examples

__all__ = ["IMAGES", "VIDEOS", "MediaKind", "MediaRows", "open_rows"]

logger = logging.getLogger(__name__)


def _import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        needed = "Reading data needs the package `datasets`: pip install 'diffusers-mcm[train]', or [eval] to measure"
        raise ImportError(needed) from error


def open_rows(source: str | os.PathLike, kind: MediaKind, **options: Any) -> MediaRows:
    """Open a data set of videos or images; the arguments are the fields of `DataRequest`.

    Rows that can be seen to be of no use are left out, kept in `skipped` with the reason, and warned of.

    Raises:
        ValueError: if there is nothing there that can be used, or no column fits; the message names the file and
            lists the columns.
    """
    _import_datasets()  # and with it Arrow, which the other modules keep rows in
    request = DataRequest(os.fspath(source), kind, **options)
    with _no_collecting():
        rows = _open_remote(request) if is_remote(request.source) else _open_local(request)
        rows = _open_hub(request) if rows is None else rows
    if not len(rows):
        raise ValueError(f"The {kind.name} data {request.source!r} has no rows in its split {request.split!r}.")
    if rows.skipped:
        logger.warning(
            "Items of no use in the %s data %r: %d are skipped, %d are left. For example%s",
            kind.name, request.source, len(rows.skipped), len(rows), examples(rows.skipped),
        )  # fmt: skip
    return rows


@contextmanager
def _no_collecting() -> Iterator[None]:
    """The garbage collector rests: it would go through the names of all files again and again, and free none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _open_local(request: DataRequest) -> MediaRows | None:
    """The rows of a folder, a table or tars of this machine; None if they are not there, or need `datasets`."""
    from .folders import TABLE_SUFFIXES, open_folder, walk
    from .shards import TAR_SUFFIXES
    from .tars import open_tars

    source = request.source
    if os.path.isdir(source):
        folder = _split_folder(request)
        files = walk(folder)
        if request.kind.loose:
            return open_folder(request, folder, files)
        tars = [os.path.join(folder, path) for path in files if path.lower().endswith(TAR_SUFFIXES)]
        if tars:
            return open_tars(request, tars)
        if any(path.lower().endswith(".zip") for path in files):
            return None
        return open_folder(request, folder, files)
    if source.lower().endswith(TABLE_SUFFIXES) and os.path.isfile(source):
        folder, table = os.path.split(os.path.abspath(source))
        return open_folder(request, folder, walk(folder), metadata=[table])
    if os.path.isfile(source):
        return open_tars(request, [source]) if source.lower().endswith(TAR_SUFFIXES) else None
    patterns = expand_braces(source)
    if not source.lower().endswith(TAR_SUFFIXES) and not glob.has_magic(source) and patterns == [source]:
        return None
    found = (path for pattern in patterns for path in glob.glob(pattern, recursive=True))
    return open_tars(request, _tars_of(source, sorted(found)))


def _tars_of(source: str, paths: list[str]) -> list[str]:
    from .shards import TAR_SUFFIXES

    tars = [path for path in paths if path.lower().endswith(TAR_SUFFIXES)]
    if not tars:
        raise ValueError(f"No .tar file matches {source!r}.")
    return tars


def _open_remote(request: DataRequest) -> MediaRows:
    """The rows of a folder, a table or tars at an address, which are read where they are."""
    from .folders import TABLE_SUFFIXES, is_metadata, open_folder
    from .shards import TAR_SUFFIXES
    from .tars import open_tars

    source = request.source.rstrip("/")
    if source.lower().endswith(TAR_SUFFIXES) or glob.has_magic(source) or expand_braces(source) != [source]:
        return open_tars(request, _tars_of(source, expand(source)))
    if source.lower().endswith(TABLE_SUFFIXES):
        folder, _, table = source.rpartition("/")
        return open_folder(request, folder, list_remote(folder) or [], metadata=[table])
    files = list_remote(source)
    if not files:
        raise ValueError(
            f"The {request.kind.name} data {source!r} is no folder whose files can be listed, nor the address of .tar "
            "files or of a table. Servers of web pages list none: give the table, or the tars as name-{000..039}.tar."
        )
    within = [path.partition("/")[2] for path in files if path.startswith(f"{request.split}/")]
    if request.split != "train" and not within:
        raise _no_split(request, sorted({path.partition("/")[0] for path in files if "/" in path}))
    if not within or (request.split == "train" and any(is_metadata(path) for path in files if "/" not in path)):
        return _open_listed(request, source, files)
    return _open_listed(request, join(source, request.split), within)


def _open_listed(request: DataRequest, folder: str, files: list[str]) -> MediaRows:
    """The rows of the files, given by their paths in it, of a remote folder: its tars if there are any."""
    from .folders import open_folder
    from .shards import TAR_SUFFIXES
    from .tars import open_tars

    tars = [join(folder, path) for path in files if path.lower().endswith(TAR_SUFFIXES)]
    return open_tars(request, tars) if tars else open_folder(request, folder, files)


def _split_folder(request: DataRequest) -> str:
    """The subfolder named like the split; the folder itself for "train" without one, or if its metadata rules all."""
    from .folders import is_metadata

    source, split = request.source, request.split
    entries, folder = list(os.scandir(source)), os.path.join(source, split)
    if split == "train" and (not os.path.isdir(folder) or any(is_metadata(entry.name) for entry in entries)):
        return source
    if not os.path.isdir(folder):
        raise _no_split(request, sorted(entry.name for entry in entries if os.path.isdir(entry)))
    return folder


def _no_split(request: DataRequest, found: list[str]) -> ValueError:
    return ValueError(
        f"The {request.kind.name} data {request.source!r} has no subfolder {request.split!r} for that split; found "
        f"{found}."
    )


# -- through `datasets` -----------------------------------------------------------------------------------------------


def _open_hub(request: DataRequest) -> MediaRows:
    """The rows of a Hub data set, or of a folder with zip archives, which `datasets` opens.

    Tars, and folders of files with tables, are read where they are; what is in one large table (parquet) is copied.
    """
    table = _load(request)
    if isinstance(table, MediaRows):
        return table
    feature = getattr(_import_datasets(), request.kind.name.capitalize())
    media_column = _find_media_column(table.features, feature, request)
    table = table.cast_column(media_column, feature(decode=False))
    return HubRows(request, table, media_column, _find_caption(_values(table, request.caption_column), request))


def _load(request: DataRequest) -> Any:
    datasets, source, split = _import_datasets(), request.source, request.split
    folder = _split_folder(request) if os.path.isdir(source) else None
    data = f"The {request.kind.name} data {source!r}"
    message = f"{data} is neither a local folder, nor .tar files, nor a Hub data set id"
    nowhere = os.path.exists(source) or os.path.isabs(source) or source.startswith(".") or source.count("/") > 1
    if folder is None and nowhere:
        raise ValueError(f"{message} (owner/name).")
    try:
        if folder is not None:  # by hand: `datasets` would put `test_1.mp4` into a test split
            files = {split: os.path.join(folder, "**")}
            return datasets.load_dataset(f"{request.kind.name}folder", data_files=files, split=split)
        in_place = _open_in_place(request)
        if in_place is not None:
            return in_place
        return datasets.load_dataset(source, request.config_name, split=split, revision=request.revision)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(f"{message} that can be reached: {error}") from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        reason = error.__cause__ or error  # what stopped the library's builder
        raise ValueError(f"{data} cannot be read by `datasets`: {reason}") from error


def _open_in_place(request: DataRequest) -> MediaRows | None:
    """The rows of a Hub data set that is a folder or tars, by what `datasets` finds out of its splits; else None."""
    arguments = (request.source, request.config_name)
    builder = _import_datasets().load_dataset_builder(*arguments, revision=request.revision)
    if not {"WebDataset", "VideoFolder", "ImageFolder"} & {kind.__name__ for kind in type(builder).__mro__}:
        return None
    addresses = list({str(split): files for split, files in builder.config.data_files.items()}.get(request.split, ()))
    pattern = r"(hf://datasets/(?:[^/@]+/)?[^/@]+@[^/]+)/(.+)"
    found = [(match[1], match[2]) for address in addresses if (match := re.fullmatch(pattern, address))]
    if len(found) < len(addresses) or not found or any(path.lower().endswith(".zip") for _, path in found):
        return None
    return _open_listed(request, found[0][0], sorted(path for _, path in found))


def _values(table: Any, asked: str | None) -> dict[tuple[str, ...], bool]:
    """The keys that lead to each value of a row, ("text",) or ("json", "caption"), and whether that is a caption.

    Of a column of json the first rows are looked at, and the others too until one has a caption, if none of those has.
    """
    values: dict[tuple[str, ...], bool] = {}
    wanted = CAPTION_COLUMNS if asked is None else (asked, asked.partition(".")[2])
    in_json = [name for name, feature in table.features.items() if isinstance(feature, _import_datasets().Json)]
    for name, feature in table.features.items():
        if isinstance(feature, Mapping):
            values |= {(name, key): _is_text(entry) for key, entry in feature.items()}
        elif name not in in_json:
            values[(name,)] = _is_text(feature)
    for name in in_json:
        keys: dict[str, bool] = {}
        for batch in table.select_columns([name]).iter(batch_size=100):
            for value in batch[name]:
                for key, entry in value.items() if isinstance(value, Mapping) else ():
                    keys[key] = keys.get(key, False) or bool(caption_texts(entry))
            if any(keys.get(key) or values.get((key,)) for key in wanted):
                break
        values |= {(name, key): keys[key] for key in sorted(keys)}
    return values


def _find_media_column(features: Mapping[str, Any], wanted: type, request: DataRequest) -> str:
    kind, asked = request.kind, request.media_column
    typed = [name for name, feature in features.items() if isinstance(feature, wanted)]
    if asked is not None and asked not in features:
        raise request.no_media_column(repr(request.source), list(features))
    if asked is None and len(typed) > 1 and kind.name not in typed:
        raise request.several_media_columns(typed)
    found = [asked, *(name for name in (kind.name, *typed) if name in typed), *kind.columns]
    if (column := next((name for name in found if name in features), None)) is None:
        raise ValueError(
            f"No {kind.name} column found in {request.source!r}: none is of type {wanted.__name__} or named one of "
            f"{list(kind.columns)}; its columns are {list(features)}. Name it with {kind.ask_for_media}."
        )
    return column


def _is_text(feature: Any) -> bool:
    """Whether a feature is text, or a list of texts."""
    datasets = _import_datasets()
    if isinstance(feature, datasets.List):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")


def _find_caption(values: Mapping[tuple[str, ...], bool], request: DataRequest) -> tuple[str, ...] | None:
    """The keys that lead to the caption: `("text",)`, `("json", "caption")`, or None if an image set has none."""
    asked = request.caption_column
    choices: list[tuple[str, ...]] = [(name,) for name in CAPTION_COLUMNS]
    choices += [("json", name) for name in CAPTION_COLUMNS]
    if asked is not None:
        outer, _, inner = asked.partition(".")
        choices = [(asked,), ("json", asked), (outer, inner)]
    found = next((keys for keys in choices if values.get(keys)), None)
    if found is None and (asked is not None or request.kind.needs_caption):
        raise request.no_caption_column(repr(request.source), [".".join(keys) for keys in values])
    return found
