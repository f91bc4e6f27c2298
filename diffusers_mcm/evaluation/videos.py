"""Sets of videos: which frames of them are compared, and a reference that is read through `data`."""

import hashlib
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..data.columns import IMAGES, VIDEOS, MediaKind
from ..data.faults import UnusableItem
from ..data.images import read_image
from ..data.rows import MediaRows
from ..data.sources import open_rows
from ..data.video import frame_rate, read_clip

logger = logging.getLogger(__name__)

WINDOWS = ("centre", "start", "random")
RESIZE = "bicubic, antialiased: shorter side scaled, centre cropped"
_FEW_SEEDS = 4  # which are named one by one


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

    def rate(self, fps: float | None) -> float:
        """How many frames a second a clip has of a file that has `fps`; NaN where that is not known."""
        if self.fps is not None:
            return self.fps
        return math.nan if fps is None else fps / self.frame_interval

    @property
    def span(self) -> int:
        """The frames of a file that its clip reaches over."""
        return (self.num_frames - 1) * self.frame_interval + 1


def _no_rate() -> None:
    """Of pictures, which have none."""


class Video(NamedTuple):
    """One video of a set, not read yet."""

    name: str
    caption: str
    seed: int | None
    read: Callable[[Window, float], np.ndarray]  # uint8 (T, H, W, 3); `UnusableItem` where the video is to blame
    stamp: Any  # plain data that changes with the bytes of the video
    rate: Callable[[], float | None] = _no_rate  # frames a second of its file, where that says it


@dataclass(frozen=True)
class VideoSet:
    """A reference, or the samples of one method."""

    name: str  # how it is called in results
    source: str  # where it lies
    videos: Sequence[Video]
    skipped: Mapping[str, str] = field(default_factory=dict)  # name and reason of what is seen to be of no use
    settings: Mapping[str, Any] = field(default_factory=dict)  # what all samples' metadata say alike
    steps: int | None = None  # of sampling
    steps_by_name: bool = False  # whether these are but the number at the end of the name
    remarks: Sequence[str] = ()  # sentences that a reader of its numbers has to know

    def captions(self) -> Counter[str]:
        """How often each caption comes."""
        return Counter(video.caption for video in self.videos)

    def within(self, name: str) -> str:
        """The name of a file within the set, which says nothing of the machine."""
        return name.removeprefix(os.path.join(self.source, ""))

    def public(self, skipped: Mapping[str, str]) -> dict[str, str]:
        """Names and reasons that say nothing of the machine."""
        folder = os.path.join(self.source, "")
        return {self.within(name): reason.replace(folder, "") for name, reason in skipped.items()}

    def described(self) -> dict[str, Any]:
        """What a protocol says of a reference: which videos these are, wherever they lie and in whatever order."""
        listed = sorted((os.path.basename(video.name), video.caption) for video in self.videos)
        return {"num_videos": len(self.videos), "sha256": digest_of(listed)}


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, names of any bytes in it."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def by_numbers(name: str) -> list[str | int]:
    """A key to sort names by, with the numbers in them as such: `a-2` comes before `a-10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def seeds_of(videos: Sequence[Video]) -> str | None:
    """The seeds of samples in words, by a digest where they are many; None where one is not known."""
    pairs = sorted((video.seed, video.caption) for video in videos if video.seed is not None)
    if len(pairs) < len(videos):
        return None
    seeds = sorted({seed for seed, _ in pairs})
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    if len(seeds) <= _FEW_SEEDS:
        return " and ".join([", ".join(map(str, seeds[:-1])), str(seeds[-1])]).removeprefix(" and ")
    return f"{len(seeds)} of SHA-256 {digest_of(pairs)[:16]}"


def open_reference(
    source: str,
    num_videos: int | None,
    seed: int,
    kind: MediaKind = VIDEOS,
    name: str = "(reference)",
    **data: Any,
) -> VideoSet:
    """Real videos or images: every row once, or `num_videos` of them that the seed chooses; nothing is replaced.

    Of rows with one file, as a table with a row for each caption has them, the seed chooses one, and others only where
    there are fewer files than `num_videos`; a warning says that some count several times. Of several captions of a row
    the seed chooses one. `data` are fields of `data.columns.DataRequest`: split, columns.

    Raises:
        ValueError: if there are fewer than `num_videos` rows with a caption.
    """
    rows = open_rows(source, kind, **data)
    files = rows.files()
    videos, taken, skipped = list[Video](), list[int](), dict(rows.skipped)
    for row in _drawn(len(rows), files, seed) if num_videos else range(len(rows)):
        if num_videos and len(videos) == num_videos:
            break
        item = rows[row]
        try:
            caption = drawn_caption(rows, row, item, seed)
            read, rate = _row_reader(rows, row), _row_rate(rows, row)
            videos.append(Video(rows.name(row, item), caption, None, read, rows.stamp(item), rate))
            taken.append(row)
        except UnusableItem as reason:
            skipped[rows.name(row, item)] = str(reason)
    if num_videos and len(videos) < num_videos:
        raise ValueError(f"{source} holds {len(videos)} {kind.name}s that can be used, fewer than {num_videos}")
    remarks = [] if files is None else _repeated(name, kind, [files[row] for row in taken])
    for remark in remarks:
        logger.warning(remark)
    return VideoSet(name, str(source), videos, skipped, remarks=[*unnamed_remarks(name, rows), *remarks])


def unnamed_remarks(name: str, rows: MediaRows) -> list[str]:
    """What a reader has to know of files that no row of a set's table names, of which opening it has warned."""
    return [f"{name}: {rows.unnamed}."] if rows.unnamed else []


def _drawn(count: int, files: Sequence[Any] | None, seed: int) -> list[int]:
    """All rows in an order of the seed's, every file once before one comes again."""
    drawn = np.random.default_rng([seed, 0]).permutation(count).tolist()
    first, again, seen = list[int](), list[int](), set()
    for row in drawn:
        file = row if files is None else files[row]
        (again if file in seen else first).append(row)
        seen.add(file)
    return [*first, *again]


def _repeated(name: str, kind: MediaKind, files: Sequence[Any]) -> list[str]:
    """A sentence if some of the files of a reference come several times; none otherwise."""
    count = len(set(files))
    sentence = (
        f"The {len(files)} {kind.name}s of {name} are {count} files, of which some count several times, as in a table"
        f" with a row for each caption. Distances differ for that: --num_{kind.name}s {count} takes each once."
    )
    return [sentence] if count < len(files) else []


def drawn_caption(rows: MediaRows, row: int, item: Mapping, seed: int) -> str:
    """The caption of a row, of several the one that the seed chooses; `UnusableItem` where it has none."""
    return normalised(rows.caption(item, float(np.random.default_rng([seed, row, 2]).random())))


def normalised(caption: str) -> str:
    """A text in one of the ways in which Unicode can write it (NFC)."""
    return unicodedata.normalize("NFC", caption)


def _row_reader(rows: MediaRows, row: int) -> Callable[[Window, float], np.ndarray]:
    def read(window: Window, start: float) -> np.ndarray:
        media = rows.media(rows[row])
        if rows.kind is IMAGES:
            return read_image(media, window.height, window.width)[None]
        return read_window(media, window, start)

    return read


def _row_rate(rows: MediaRows, row: int) -> Callable[[], float | None]:
    return _no_rate if rows.kind is IMAGES else lambda: frame_rate(rows.media(rows[row]))


def read_window(media: dict, window: Window, start: float) -> np.ndarray:
    size = (window.height, window.width)
    return read_clip(media, window.num_frames, window.frame_interval, *size, start, window.fps, strict=True)
