"""Sets of videos: a reference read through `data`, and folders of samples of this package or of any other tool."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.columns import IMAGES, VIDEOS
from ..data.faults import UnusableItem
from ..data.images import fit, read_image
from ..data.rows import MediaRows
from ..data.sources import open_rows
from ..data.video import read_clip
from ..hub import public_name
from ..video_io import read_metadata

WINDOWS = ("centre", "start", "random")
_METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.parquet")
_SUFFIXES = (*VIDEOS.extensions, ".gif", ".webp")
_NUMBERED = re.compile(r"(?P<prompt>.+)-(?P<index>\d+)")  # VBench's naming


class Window(NamedTuple):
    """Which frames of a video are compared.

    Attributes:
        num_frames: frames of a clip.
        frame_interval: every how many frames of the file one is taken; a shorter file is skipped, never read faster.
        fps: takes frames at this rate by their times instead.
        place: "centre", "start" or "random" (keyed by the seed and the video's number).
        height, width: the shortest side is scaled to these, the centre cropped.
    """

    num_frames: int
    frame_interval: int
    fps: float | None
    place: str
    height: int
    width: int

    def start(self, seed: int, number: int) -> float:
        """Where the clip of video `number` starts, in [0, 1)."""
        if self.place == "random":
            return float(np.random.default_rng([seed, number, 1]).random())
        return {"centre": 0.5, "start": 0.0}[self.place]

    @property
    def span(self) -> int:
        """Frames that a file must have."""
        return (self.num_frames - 1) * self.frame_interval + 1 if self.fps is None else self.num_frames


class Video(NamedTuple):
    """One video of a set, not read yet."""

    name: str
    caption: str
    seed: int | None
    read: Callable[[Window, float], np.ndarray]  # uint8 (T, H, W, 3), `UnusableItem` where it cannot


@dataclass(frozen=True)
class VideoSet:
    """A reference, or the samples of one method.

    Attributes:
        name: how it is called in results.
        source: where it lies.
        videos: in their order.
        skipped: name and reason of what could be seen to be of no use without reading it.
        settings: what all samples' own metadata say alike: model, LoRA, steps.
    """

    name: str
    source: str
    videos: Sequence[Video]
    skipped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """What a protocol says of a reference: which videos these are, wherever they lie."""
        state = hashlib.sha256()
        for video in self.videos:
            state.update(repr((os.path.basename(video.name), video.caption)).encode())
        return {
            "name": public_name(self.source, given=True),
            "num_videos": len(self.videos),
            "sha256": state.hexdigest(),
        }

    def captions_digest(self) -> str:
        """SHA-256 over all captions, in whatever order the videos are."""
        return hashlib.sha256(repr(sorted(video.caption for video in self.videos)).encode()).hexdigest()


def open_reference(source: str, num_videos: int | None, seed: int, kind=VIDEOS, name: str = "reference") -> VideoSet:
    """Real videos or images: every row once, or `num_videos` of them that the seed chooses; nothing is replaced.

    Of several captions of a row the seed chooses one.

    Raises:
        ValueError: if there are fewer than `num_videos` rows with a caption.
    """
    rows = open_rows(source, kind)
    order = np.random.default_rng([seed, 0]).permutation(len(rows)) if num_videos else np.arange(len(rows))
    videos, skipped = list[Video](), dict(rows.skipped)
    for row in order.tolist():
        if num_videos and len(videos) == num_videos:
            break
        item = rows[row]
        try:
            draw = float(np.random.default_rng([seed, row, 2]).random())
            videos.append(
                Video(rows.name(row, item), rows.caption(item, draw), int(row), _reader(rows, row, kind is IMAGES))
            )
        except UnusableItem as reason:
            skipped[rows.name(row, item)] = str(reason)
    if num_videos and len(videos) < num_videos:
        raise ValueError(f"{source} holds {len(videos)} {kind.name}s that can be used, fewer than {num_videos}")
    return VideoSet(name, str(source), videos, skipped)


def _reader(rows: MediaRows, row: int, image: bool) -> Callable[[Window, float], np.ndarray]:
    def read(window: Window, start: float) -> np.ndarray:
        media = rows.media(rows[row])
        return read_image(media, window.height, window.width)[None] if image else _clip(media, window, start)

    return read


def _clip(media: dict, window: Window, start: float) -> np.ndarray:
    size = (window.height, window.width)
    return read_clip(media, window.num_frames, window.frame_interval, *size, start, window.fps, window.span)


def open_samples(folder: str | os.PathLike, name: str | None = None) -> VideoSet:
    """The videos of a folder: `diffusers-mcm generate`'s, any tool's beside a `metadata.csv`, or VBench's names.

    The prompt is what a table beside the files says, else what the file's own metadata say, else the file's name
    without `-0` at its end. Frames in folders are read as well. Samples are read from their first frame on, each
    frame.

    Raises:
        ValueError: if there are no videos, or one has no prompt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"expected a folder of videos, got {str(folder)!r}, which is {_what_is(folder)}")
    name = name or folder.name or folder.resolve().name
    if any((folder / table).is_file() for table in _METADATA_NAMES):
        listed = open_reference(str(folder), None, 0, name=name)
        unseeded = [video._replace(seed=None) for video in listed.videos]
        return VideoSet(name, str(folder), unseeded, listed.skipped)
    videos, found = list[Video](), list[dict]()
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not any(path.glob("*.png")) or not path.is_dir() and path.suffix.lower() not in _SUFFIXES:
            continue
        metadata = read_metadata(path) or {}
        numbered = _NUMBERED.fullmatch(path.name if path.is_dir() else path.stem)
        prompt = metadata.get("prompt") or (numbered and numbered["prompt"])
        if not prompt:
            raise ValueError(
                f"{path} does not say what it shows: expected a prompt in its metadata, a metadata.csv with file_name"
                " and caption beside it, or a name such as 'a prompt-0.mp4'"
            )
        seed = metadata.get("seed", int(numbered["index"]) if numbered else None)
        videos.append(Video(str(path), str(prompt), seed, _sample_reader(path)))
        found.append({key: value for key, value in metadata.items() if key not in ("prompt", "seed")})
    if not videos:
        raise ValueError(f"{folder} holds no videos: none of its files ends in {', '.join(_SUFFIXES)}")
    return VideoSet(name, str(folder), videos, settings=_alike(found))


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "not there"


def _alike(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rows say, and say alike."""
    rows = list(rows)
    return {key: value for key, value in rows[0].items() if all(row.get(key) == value for row in rows)}


def _sample_reader(path: Path) -> Callable[[Window, float], np.ndarray]:
    def read(window: Window, start: float) -> np.ndarray:
        if path.is_dir():
            return _fitted([read_picture(frame) for frame in sorted(path.glob("*.png"))], window)
        if path.suffix.lower() == ".webp":
            return _fitted(read_animation(path), window)
        return _clip({"path": str(path), "bytes": None}, window, start)

    return read


def read_picture(path: Path):
    """One picture of a folder of frames, as PIL opens it."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def read_animation(path: Path) -> list:
    """All pictures of an animated WebP, which FFmpeg does not decode."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def _fitted(pictures: Sequence, window: Window) -> np.ndarray:
    """The first frames of a clip, of the size that is asked for."""
    if len(pictures) < window.span:
        raise UnusableItem(f"it has {len(pictures)} frames, fewer than the {window.span} asked for")
    chosen = pictures[: window.span : window.frame_interval]
    return np.stack([np.asarray(fit(picture, window.height, window.width)) for picture in chosen])


def size_of(videos: Sequence[Video]) -> tuple[int, int]:
    """Height and width of the first sample that can be read, which all clips are then brought to."""
    for video in videos:
        path = Path(video.name)
        try:
            if path.is_dir():
                return read_picture(min(path.glob("*.png"))).size[::-1]
            if path.suffix.lower() == ".webp":
                return read_animation(path)[0].size[::-1]
            import av

            with av.open(str(path), metadata_errors="ignore") as container:
                stream = container.streams.video[0]
                return stream.height, stream.width
        except (OSError, IndexError, ValueError):
            continue
    raise ValueError(f"none of the {len(videos)} videos can be read, so that their size is unknown: say --size")
