"""Sets of videos: a reference read through `data`, and folders of samples of this package or of any other tool."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.columns import IMAGES, VIDEOS, MediaKind
from ..data.faults import UnusableItem, unusable
from ..data.images import fit, read_image
from ..data.remote import file_version
from ..data.rows import MediaRows
from ..data.sources import open_rows
from ..data.video import read_clip
from ..video_io import read_metadata

WINDOWS = ("centre", "start", "random")
RESIZE = "bicubic, antialiased: shorter side scaled, centre cropped"
_METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.parquet")
_ANIMATIONS = (".gif", ".webp")  # which Pillow reads with how long each picture stays
_SUFFIXES = (*VIDEOS.extensions, *_ANIMATIONS)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NUMBERED = re.compile(r"(?P<prompt>.+)-(?P<index>\d+)")  # VBench's naming


class Window(NamedTuple):
    """Which frames of a video are compared, and their size."""

    num_frames: int
    frame_interval: int  # every how many frames of the file one is taken
    fps: float | None  # takes frames at this rate by their times instead
    place: str  # of the clip: "centre", "start", or "random", keyed by the seed and the video's number
    height: int
    width: int

    def start(self, seed: int, number: int) -> float:
        """Where the clip of video `number` starts, in [0, 1)."""
        if self.place == "random":
            return float(np.random.default_rng([seed, number, 1]).random())
        return {"centre": 0.5, "start": 0.0}[self.place]

    @property
    def span(self) -> int:
        """The frames of a file that its clip reaches over."""
        return (self.num_frames - 1) * self.frame_interval + 1


class Video(NamedTuple):
    """One video of a set, not read yet."""

    name: str
    caption: str
    seed: int | None
    read: Callable[[Window, float], np.ndarray]  # uint8 (T, H, W, 3); `UnusableItem` where the video is to blame
    stamp: Any  # plain data that changes with the bytes of the video


@dataclass(frozen=True)
class VideoSet:
    """A reference, or the samples of one method."""

    name: str  # how it is called in results
    source: str  # where it lies
    videos: Sequence[Video]
    skipped: Mapping[str, str] = field(default_factory=dict)  # name and reason of what is seen to be of no use
    settings: Mapping[str, Any] = field(default_factory=dict)  # what all samples' metadata say alike

    def captions(self) -> Counter[str]:
        """How often each caption comes."""
        return Counter(video.caption for video in self.videos)

    def described(self) -> dict[str, Any]:
        """What a protocol says of a reference: which videos these are, wherever they lie and in whatever order."""
        listed = sorted((os.path.basename(video.name), video.caption) for video in self.videos)
        return {"num_videos": len(self.videos), "sha256": digest_of(listed)}


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, names of any bytes in it."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def open_reference(
    source: str,
    num_videos: int | None,
    seed: int,
    kind: MediaKind = VIDEOS,
    name: str = "(reference)",
    **data: Any,
) -> VideoSet:
    """Real videos or images: every row once, or `num_videos` of them that the seed chooses; nothing is replaced.

    Of several captions of a row the seed chooses one. `data` are fields of `data.columns.DataRequest`: split, columns.

    Raises:
        ValueError: if there are fewer than `num_videos` rows with a caption.
    """
    rows = open_rows(source, kind, **data)
    order = np.random.default_rng([seed, 0]).permutation(len(rows)) if num_videos else np.arange(len(rows))
    videos, skipped = list[Video](), dict(rows.skipped)
    for row in order.tolist():
        if num_videos and len(videos) == num_videos:
            break
        item = rows[row]
        try:
            draw = float(np.random.default_rng([seed, row, 2]).random())
            caption = normalised(rows.caption(item, draw))
            videos.append(Video(rows.name(row, item), caption, None, _row_reader(rows, row), rows.stamp(item)))
        except UnusableItem as reason:
            skipped[rows.name(row, item)] = str(reason)
    if num_videos and len(videos) < num_videos:
        raise ValueError(f"{source} holds {len(videos)} {kind.name}s that can be used, fewer than {num_videos}")
    return VideoSet(name, str(source), videos, skipped)


def normalised(caption: str) -> str:
    """A text in one of the ways in which Unicode can write it (NFC)."""
    return unicodedata.normalize("NFC", caption)


def _row_reader(rows: MediaRows, row: int) -> Callable[[Window, float], np.ndarray]:
    def read(window: Window, start: float) -> np.ndarray:
        media = rows.media(rows[row])
        if rows.kind is IMAGES:
            return read_image(media, window.height, window.width)[None]
        return _clip(media, window, start)

    return read


def _clip(media: dict, window: Window, start: float) -> np.ndarray:
    size = (window.height, window.width)
    return read_clip(media, window.num_frames, window.frame_interval, *size, start, window.fps, strict=True)


def open_samples(folder: str | os.PathLike, name: str | None = None) -> VideoSet:
    """The videos of a folder: `diffusers-mcm generate`'s, any tool's beside a `metadata.csv`, or VBench's names.

    The prompt is what a table beside the files says, else what the files' own metadata say, else the files' names
    without `-0` at their ends. Folders of frames are read as well. Samples are read from their first frame on, each
    frame. What cannot be opened at all is skipped, with the reason.

    Raises:
        ValueError: if there are no videos, or some do not say what they show.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise ValueError(f"expected a folder of videos, got {str(folder)!r}, which is {found}")
    name = name or folder.name or folder.resolve().name
    if any((folder / table).is_file() for table in _METADATA_NAMES):
        listed = open_reference(str(folder), None, 0, name=name)
        return VideoSet(
            name, str(folder), [_sample(Path(v.name), v.caption, None) for v in listed.videos], listed.skipped
        )
    paths = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and _holds_frames(path)]
    if not paths:
        raise ValueError(f"{folder} holds no videos: none of its files ends in {', '.join(_SUFFIXES)}")
    metadata = {path: read_metadata(path) or {} for path in paths}
    if any("prompt" in found for found in metadata.values()):
        return _own_samples(name, folder, metadata)
    return _named_samples(name, folder, paths)


def _holds_frames(path: Path) -> bool:
    return bool(frame_files(path)) if path.is_dir() else path.suffix.lower() in _SUFFIXES


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by the numbers in their names: 2 comes before 10."""
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES and path.name[0] != "."]
    return sorted(pictures, key=lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name)])


def _own_samples(name: str, folder: Path, metadata: Mapping[Path, Mapping[str, Any]]) -> VideoSet:
    """Samples of which at least one says its prompt in its metadata."""
    videos, skipped = list[Video](), dict[str, str]()
    for path, found in metadata.items():
        if "prompt" in found:
            videos.append(_sample(path, str(found["prompt"]), found.get("seed"), found))
        elif reason := _why_unreadable(path):
            skipped[str(path)] = reason
        else:
            raise ValueError(f"{path} does not say what it shows, as others of {folder} do: move it elsewhere")
    said = [found for found in metadata.values() if "prompt" in found]
    return VideoSet(name, str(folder), videos, skipped, _alike(said, ("prompt", "seed")))


def _named_samples(name: str, folder: Path, paths: Sequence[Path]) -> VideoSet:
    """Samples that are called by their prompts."""
    videos = []
    for path in paths:
        numbered = _NUMBERED.fullmatch(path.name if path.is_dir() else path.stem)
        if not numbered:
            raise ValueError(
                f"{path} does not say what it shows: expected a prompt in its metadata, a metadata.csv with file_name"
                " and caption beside it, or a name such as 'a prompt-0.mp4'"
            )
        videos.append(_sample(path, numbered["prompt"], int(numbered["index"])))
    if len(videos) > 1 and len({video.caption for video in videos}) == 1:
        raise ValueError(
            f"all {len(videos)} videos of {folder} would show {videos[0].caption!r}, by their names: write a"
            " metadata.csv with file_name and caption beside them that says what they show"
        )
    return VideoSet(name, str(folder), videos)


def _sample(path: Path, caption: str, seed: int | None, metadata: Mapping[str, Any] | None = None) -> Video:
    stamp = [[each.name, file_version(each)] for each in frame_files(path)] if path.is_dir() else file_version(path)

    def read(window: Window, start: float) -> np.ndarray:
        if path.is_dir() or path.suffix.lower() in _ANIMATIONS:
            return _fitted(_pictures(path, metadata or {}), window)
        return _clip({"path": str(path), "bytes": None}, window, start)

    return Video(str(path), normalised(caption), seed, read, stamp)


def _alike(rows: Iterable[Mapping[str, Any]], but: Sequence[str]) -> dict[str, Any]:
    """What all rows say, and say alike."""
    rows = list(rows)
    return {k: value for k, value in rows[0].items() if k not in but and all(row.get(k) == value for row in rows)}


def _pictures(path: Path, metadata: Mapping[str, Any]) -> list:
    """The frames of a folder or of an animation, each as often as it stays.

    A writer of animations makes one picture of equal ones in a row, and a picture without times of a still video; of
    one that says its `fps` and `num_frames` the frames are known all the same.
    """
    from PIL import Image, ImageSequence

    try:
        if path.is_dir():
            return [Image.open(frame).convert("RGB") for frame in frame_files(path)]
        with Image.open(path) as image:
            shown = [(each.convert("RGB"), each.info.get("duration", 0)) for each in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise unusable(error, str(path), "the video") from error
    count, fps = metadata.get("num_frames"), metadata.get("fps")
    if not count or not fps or len(shown) >= count:
        return [picture for picture, _ in shown]
    if len(shown) == 1:
        return [shown[0][0]] * count
    return [picture for picture, duration in shown for _ in range(max(1, round(duration * fps / 1000)))]


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
    if path.is_dir() or path.suffix.lower() in _ANIMATIONS:
        width, height = _pictures(path, {})[0].size
        return height, width
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (OSError, IndexError, ValueError) as error:
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
