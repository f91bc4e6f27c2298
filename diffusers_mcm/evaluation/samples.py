"""Folders of samples: of this package, of any other tool with a table beside them, or named as VBench names them."""

import json
import logging
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.columns import VIDEOS
from ..data.faults import UnusableItem, unusable
from ..data.folders import holds_settings, is_metadata
from ..data.images import fit
from ..data.remote import file_version
from ..data.sources import open_rows
from ..data.video import frame_rate
from ..video_io import read_metadata
from . import animations
from .animations import Told, frame_files, holds_pictures
from .records import steps_in_name
from .videos import Video, VideoSet, Window, drawn_caption, normalised, read_window, unnamed_remarks

logger = logging.getLogger(__name__)

_SAMPLES = replace(VIDEOS, extensions=(*VIDEOS.extensions, *animations.RESOLUTION), caption_flag=None, loose=True)
STEPS = "num_inference_steps"
# columns of a table beside samples, and what `generate` calls the same in a file's own metadata
_TOLD = {name: name for name in (STEPS, "seed", "sampler", "timestep_spacing", "guidance_scale", "model", "fps")}
_TOLD["steps"] = STEPS
_NUMBERED = re.compile(r"(?P<prompt>.+)-\d+")  # VBench's naming
_WHOLE = re.compile(r"(\d+)(\.0*)?")  # as pandas writes those of a column with gaps
_Shown = tuple[Path, str, Mapping[str, Any]]  # a video, what it shows, and what is said of how it was made


def open_samples(folder: str | os.PathLike, name: str | None = None) -> VideoSet:
    """The videos of a folder: `diffusers-mcm generate`'s, any tool's beside a `metadata.csv`, or VBench's names.

    The prompt is what a table beside the files says, else what the files' own metadata say, else the files' names
    without `-0` at their ends, which counts the videos of a prompt. Seeds and steps are taken from the table and the
    files' metadata, the steps else from the number at the end of the folder's name. Folders of frames are read as
    well. Samples are read from their first frame on, each frame. What cannot be opened at all is skipped, with the
    reason.

    Raises:
        ValueError: if there are no videos, or some do not say what they show.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise ValueError(f"expected a folder of videos, got {str(folder)!r}, which is {found}")
    name = name or folder.name or folder.resolve().name
    entries = sorted(folder.iterdir())
    tables = [path for path in entries if is_metadata(path.name) and os.path.isfile(path)]
    if not all(holds_settings(str(path), _SAMPLES) for path in tables):
        return _listed_samples(name, folder)
    paths = [path for path in entries if path.name[0] != "." and _holds_frames(path)]
    if not paths:
        raise ValueError(f"{folder} holds no videos: none of its files ends in {', '.join(_SAMPLES.extensions)}")
    metadata = {path: _own_metadata(path) for path in paths}
    if any("prompt" in found for found in metadata.values()):
        return _own_samples(name, folder, metadata)
    return _named_samples(name, folder, metadata)


def _holds_frames(path: Path) -> bool:
    """Whether a path is a video, by its name, or a folder of frames."""
    if not os.path.isdir(path):
        return path.suffix.lower() in _SAMPLES.extensions
    try:
        return bool(frame_files(path))
    except UnusableItem as reason:
        logger.warning("What lies in %s is not read: %s", path, reason)
        return False


def _own_metadata(path: Path) -> dict[str, Any]:
    """What a file says of how it was made, if it says so in words; nothing of the graphs of nodes that others write.

    ComfyUI calls a graph `prompt` as well, an object or the text of one, and often has a `workflow` beside it.
    """
    found = read_metadata(path) or {}
    prompt = found.get("prompt", "")
    is_graph = not isinstance(prompt, str)
    if not is_graph:
        with suppress(ValueError, RecursionError):
            is_graph = isinstance(json.loads(prompt), (dict, list))
    return {} if is_graph or "workflow" in found else found


def _listed_samples(name: str, folder: Path) -> VideoSet:
    """Samples that a table beside them lists."""
    rows = open_rows(folder, _SAMPLES, extra_columns=tuple(_TOLD))
    shown, skipped = list[_Shown](), dict(rows.skipped)
    for number in range(len(rows)):
        item = rows[number]
        path = Path(rows.name(number, item))
        try:
            caption = drawn_caption(rows, number, item, 0)
        except UnusableItem as reason:
            skipped[str(path)] = str(reason)
        else:
            shown.append((path, caption, {**_own_metadata(path), **_told(rows.said(item))}))
    found = _described(name, folder, _samples(shown), skipped, [said for _, _, said in shown])
    return replace(found, remarks=[*unnamed_remarks(name, rows), *found.remarks])


def _told(columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of how a sample was made, under the names of `generate`'s own metadata."""
    told = dict[str, Any]()
    for column, key in _TOLD.items():
        if (value := columns.get(column)) not in (None, ""):
            told.setdefault(key, _number(value))
    return told


def _own_samples(name: str, folder: Path, metadata: Mapping[Path, Mapping[str, Any]]) -> VideoSet:
    """Samples of which at least one says its prompt in its metadata."""
    shown, skipped = list[_Shown](), dict[str, str]()
    for path, found in metadata.items():
        if "prompt" in found:
            shown.append((path, found["prompt"], found))
        elif reason := _why_unreadable(path):
            skipped[str(path)] = reason
        else:
            raise ValueError(f"{path} does not say what it shows, as others of {folder} do: move it elsewhere")
    return _described(name, folder, _samples(shown), skipped, [found for _, _, found in shown])


def _described(
    name: str, folder: Path, videos: Sequence[Video], skipped: Mapping[str, str], said: Sequence[Mapping[str, Any]]
) -> VideoSet:
    """A set of samples with what their metadata say of all of them."""
    settings = _alike(said, ("prompt", "negative_prompt", "seed"))
    mentioned = {_whole(each.get(STEPS)) for each in said}
    steps = mentioned.pop() if len(mentioned) == 1 else None
    by_name = None if mentioned - {None} or steps is not None else steps_in_name(name)
    remarks = _repeated(name, videos)
    for remark in remarks:
        logger.warning(remark)
    about = settings, steps or by_name, by_name is not None
    return VideoSet(name, str(folder), videos, skipped, *about, remarks)


def _repeated(name: str, videos: Sequence[Video]) -> list[str]:
    """Sentences if videos of a set are one file, or several of one caption and one seed; none otherwise."""
    by_file, by_seed = dict[Any, list[Video]](), dict[Any, list[Video]]()
    for video in videos:
        by_file.setdefault(video.name, []).append(video)
        by_seed.setdefault((video.caption, video.name if video.seed is None else video.seed), []).append(video)
    found = []
    for alike, what in ((by_file, "are the file"), (by_seed, "have the caption and the seed")):
        if (count := len(videos) - len(alike)) > 0:
            example = next(several for several in alike.values() if len(several) > 1)
            names = " and ".join(os.path.basename(video.name) for video in example[:2])
            found.append(
                f"{count} of the {len(videos)} videos of {name} {what} of another one, and count beside it: {names}."
            )
    return found


def _number(value: Any) -> Any:
    """A number of the text in which a table has it, a whole one for what is whole; anything else as it came."""
    if not isinstance(value, str):
        return value
    if whole := _WHOLE.fullmatch(value.strip()):
        return int(whole[1])  # which a float would round where it is long
    with suppress(ValueError):
        return float(value)
    return value


def _whole(value: Any) -> int | None:
    """A whole number, as JSON or a table has it; None for anything else."""
    value = _number(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _rate(value: Any) -> float | None:
    """Frames a second, as JSON or a table has them; None for what can be none."""
    value = _number(value)
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return float(value) if known else None


def _named_samples(name: str, folder: Path, metadata: Mapping[Path, Mapping[str, Any]]) -> VideoSet:
    """Samples that are called by their prompts. The numbers after these count them, and are no seeds."""
    shown = list[_Shown]()
    for path, said in metadata.items():
        numbered = _NUMBERED.fullmatch(path.name if os.path.isdir(path) else path.stem)
        if not numbered:
            raise ValueError(
                f"{path} does not say what it shows: expected a prompt in its metadata, a metadata.csv with file_name"
                " and caption beside it, or a name such as 'a prompt-0.mp4'"
            )
        shown.append((path, numbered["prompt"], said))
    videos = _samples(shown)
    found = _described(name, folder, videos, {}, list(metadata.values()))
    if len(videos) < 2 or len(found.captions()) > 1:
        return found
    (caption,) = found.captions()
    if caption.isascii() and len(caption.split()) < 2:  # a word such as "sample", where a language has spaces
        raise ValueError(
            f"all {len(videos)} videos of {folder} would show {caption!r}, by their names: write a metadata.csv with"
            " file_name and caption beside them that says what they show"
        )
    remark = f"All {len(videos)} videos of {name} show {caption!r}, by their names."
    logger.warning(remark)
    return replace(found, remarks=[remark, *found.remarks])


def _samples(shown: Sequence[_Shown]) -> list[Video]:
    """The videos, with the frame time that animations have of which nothing says it alone."""
    stays = {path: animations.durations_of(path) for path, _, said in shown if _counts_alone(path, said)}
    times = [1000 / fps for _, _, said in shown if (fps := _rate(said.get("fps")))]
    times += [time for path, each in stays.items() if (time := animations.frame_time(path, each))]
    common = statistics.median_low(times) if stays and times else None
    return [_sample(path, caption, said, stays.get(path, []), common) for path, caption, said in shown]


def _counts_alone(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether a video is an animation that has to tell its frames by how long its pictures stay."""
    return not os.path.isdir(path) and holds_pictures(path) and _rate(said.get("fps")) is None


def _sample(
    path: Path, caption: str, said: Mapping[str, Any], durations: Sequence[float], common: float | None
) -> Video:
    told = Told(_rate(said.get("fps")), _whole(said.get("num_frames")), common if durations else None)
    stamp: Any = file_version(path)
    if os.path.isdir(path):
        with suppress(UnusableItem):  # which is told where it is read
            stamp = [[each.name, file_version(each)] for each in frame_files(path)]
    if holds_pictures(path):
        stamp = [stamp, *told]  # what is told decides the frames, as the bytes do

    def read(window: Window, start: float) -> np.ndarray:
        if holds_pictures(path):
            return _fitted(animations.frames_of(path, told), window)
        return read_window({"path": str(path), "bytes": None}, window, start)

    def rate() -> float | None:
        if holds_pictures(path):
            return animations.rate_of(path, durations, told)
        return frame_rate({"path": str(path), "bytes": None})

    return Video(str(path), normalised(caption), _whole(said.get("seed")), read, stamp, rate)


def _alike(rows: Sequence[Mapping[str, Any]], but: Sequence[str]) -> dict[str, Any]:
    """What all rows say, and say alike."""
    first = rows[0] if rows else {}
    return {k: value for k, value in first.items() if k not in but and all(row.get(k) == value for row in rows)}


def _fitted(pictures: Sequence, window: Window) -> np.ndarray:
    """The first frames of a clip, of the size that is asked for."""
    if len(pictures) < window.span:
        raise UnusableItem(f"it has {len(pictures)} frames, fewer than the {window.span} asked for")
    chosen = pictures[: window.span : window.frame_interval]
    return np.stack([np.asarray(fit(picture, window.height, window.width)) for picture in chosen])


def _why_unreadable(path: Path) -> str | None:
    """Why a file cannot be opened; None if it can."""
    try:
        _size(path)
    except UnusableItem as reason:
        return str(reason)
    return None


def _size(path: Path) -> tuple[int, int]:
    """Height and width of the frames of a sample."""
    if holds_pictures(path):
        return animations.size_of(path)
    import av

    try:
        with av.open(os.path.join(os.curdir, path), metadata_errors="ignore") as container:  # no protocol
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise unusable(error, str(path), "the video") from error


def size_of(samples: Sequence[VideoSet]) -> tuple[int, int]:
    """Height and width that all methods' samples have, told from the first of each that can be opened.

    Raises:
        ValueError: if none can be opened, or they differ.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for each in samples:
        for video in each.videos:
            try:
                sizes[each.source] = _size(Path(video.name))
                break
            except UnusableItem:
                continue
        else:
            raise ValueError(f"none of the {len(each.videos)} videos of {each.source} can be opened")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{width}×{height} in {source}" for source, (height, width) in sizes.items())
        raise ValueError(f"expected samples of one size, got {told}: say with --size to which all are brought")
    return next(iter(sizes.values()))
