"""Animations and folders of frames: which pictures they show, and for how many frames each of them stands."""

import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageSequence

from ..data.faults import UnusableItem, unusable
from ..data.images import BROKEN_FILE, to_rgb
from .videos import by_numbers

RESOLUTION = {".gif": 10, ".webp": 1}  # what animations are called, and the milliseconds in which they count
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OFF = 0.1  # of a picture's time, up to which it counts as a multiple of the frames'


class Told(NamedTuple):
    """What is known of an animation from elsewhere than its pictures.

    Attributes:
        fps: its frames a second.
        num_frames: how many it has.
        common: for how many milliseconds the frames of the folder's other animations stay.
    """

    fps: float | None = None
    num_frames: int | None = None
    common: float | None = None


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder of frames, or an animation."""
    return os.path.isdir(path) or path.suffix.lower() in RESOLUTION


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by the numbers in their names: 2 comes before 10; `UnusableItem` if it is closed."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise unusable(error, str(folder), "the video") from error
    pictures = [path for path in paths if path.suffix.lower() in _PICTURES and path.name[0] != "."]
    return sorted(pictures, key=lambda path: by_numbers(path.name))


def frames_of(path: Path, told: Told) -> list[Image.Image]:
    """The frames of a folder, or of an animation with each picture as often as it stands for a frame.

    Raises:
        UnusableItem: if they cannot be read, or it is one picture of which nothing says for how many frames it stands.
    """
    if os.path.isdir(path):
        return [to_rgb(each) for file in frame_files(path) for each in _opened(file, path, 1)]
    shown = [(to_rgb(each), _stay(each)) for each in _opened(path, path)]
    durations = [duration for _, duration in shown]
    times = repeats(path, durations, told)
    if times is None:
        stays = f" that stays {durations[0] / 1000:g} s" if durations[0] else ""
        raise UnusableItem(
            f"it is one picture{stays}, and nothing says how many frames that is: write fps into a metadata.csv beside"
            " it, or the video as mp4"
        )
    return [picture for (picture, _), count in zip(shown, times) for _ in range(count)]


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of the first picture of a folder of frames, or of an animation."""
    files = frame_files(path) if os.path.isdir(path) else [path]
    if not files:
        raise UnusableItem("it is a folder without pictures")
    (first,) = _opened(files[0], path, 1)
    return first.height, first.width


def durations_of(path: Path) -> list[float]:
    """For how many milliseconds each picture of an animation stays, 0 where nothing says it; none if it is broken."""
    try:
        return [_stay(each) for each in _opened(path, path)]
    except UnusableItem:  # which is told where it is read
        return []


def _opened(file: Path, video: Path, count: int | None = None) -> Iterator[Image.Image]:
    """The pictures, all or the first ones, of a file of a video; each is gone when the next one comes."""
    try:  # Pillow's code only, whose complaints are about the file
        with Image.open(file) as image:
            for each in itertools.islice(ImageSequence.Iterator(image), count):
                each.load()
                yield each
    except (*BROKEN_FILE, MemoryError) as error:
        raise unusable(error, str(video), "the video") from error


def _stay(picture: Image.Image) -> float:
    """For how many milliseconds a picture stays, which that of a WebP knows when it has been loaded."""
    return float(picture.info.get("duration") or 0)


def frame_time(path: Path, durations: Sequence[float]) -> float | None:
    """For how many milliseconds a frame of an animation stays, by its own pictures; None if they do not say it.

    Of equal frames in a row writers make one picture that stays longer: frames are those that stay shortest. Delays of
    3, 3 and 4 hundredths are one rate of 30.
    """
    if len(durations) < 2 or min(durations) <= 0:
        return None
    return statistics.mean(d for d in durations if d <= min(durations) + RESOLUTION[path.suffix.lower()])


def repeats(path: Path, durations: Sequence[float], told: Told) -> list[int] | None:
    """For how many frames each picture of an animation stands; None if it is one of which nothing says it."""
    resolution, count = RESOLUTION[path.suffix.lower()], told.num_frames or 0
    alone, timed = len(durations) == 1, min(durations) > 0
    if count >= len(durations) and (timed or alone):
        return _multiples(durations, sum(durations) / count, 0) if timed else [count]
    if not timed:
        return None if alone else [1] * len(durations)
    for unit in (1000 / told.fps if told.fps else None, told.common):
        if unit is not None:
            times = _multiples(durations, unit, resolution)
            if all(abs(n * unit - d) <= max(resolution, _OFF * d) for n, d in zip(times, durations)):
                return times
    own = frame_time(path, durations)
    return None if own is None else _multiples(durations, own, resolution)


def _multiples(durations: Sequence[float], unit: float, resolution: int) -> list[int]:
    """How many frames each duration is, at least one.

    Of frames that are meant to stay 125 milliseconds a GIF may say 120 each, and 2000 of 16 of them: of whole steps of
    the resolution each may be a part of one short.
    """
    is_whole = resolution > 0 and unit % resolution == 0
    return [max(1, int((duration + (resolution if is_whole else unit / 2)) / unit)) for duration in durations]


def rate_of(path: Path, durations: Sequence[float], told: Told) -> float | None:
    """Frames a second: what is said of them, else by how long the pictures stay; None if neither tells it."""
    if told.fps is not None:
        return told.fps
    if not durations or min(durations) <= 0 or (times := repeats(path, durations, told)) is None:
        return None
    return 1000 * sum(times) / sum(durations)
