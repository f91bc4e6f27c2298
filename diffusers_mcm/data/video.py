"""Reading one clip with PyAV, decoding only what is needed for the frames that are used."""

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from .counted import counted_film, film_key, remember
from .faults import UnusableItem, check_own_fault, unusable
from .film import FilmIndex, film_streams, open_film, read_index, read_packets
from .frames import orientation_of, picture
from .images import open_path
from .timing import ClipChoice

_counted: dict[tuple | None, FilmIndex] = {}  # the films that this process counted, the one read last at the end


class _Pictures:
    """The pictures at some places of a film, each scaled as soon as it is decoded: whole frames take much room.

    What is wrong with one counts once the clip is known to consist of these.
    """

    def __init__(
        self, positions: Sequence[int], film: FilmIndex, container: av.container.InputContainer, size: tuple[int, int]
    ):
        self.positions, self.size, self.orientation = positions, size, film.orientation
        self.stream = cast(av.VideoStream, container.streams[film.stream])
        self._reformatter = VideoReformatter()
        self._found: dict[int, np.ndarray] = {}
        self._problem: UnusableItem | None = None

    def take(self, position: int | None, frame: av.VideoFrame) -> None:
        """Every frame that is decoded, for one may turn those after it; `position` is None before the clip."""
        self.orientation = orientation_of(frame) or self.orientation
        if position is not None and position in self.positions:
            try:
                self._found[position] = picture(frame, self.stream, self.orientation, *self.size, self._reformatter)
            except UnusableItem as reason:
                self._problem = self._problem or reason.with_traceback(None)  # which would keep the frame

    def clip(self) -> np.ndarray:
        """uint8 (T, H, W, 3); by time, one picture may come more than once."""
        if self._problem is not None:
            raise self._problem
        return np.stack([self._found[position] for position in self.positions])


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames in the order in which they are shown, from the next keyframe on."""
    packets = read_packets(container, stream)
    for packet in itertools.dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets):
        yield from packet.decode()


def _decode(
    container: av.container.InputContainer, pictures: _Pictures, film: FilmIndex, seek_to: int, since: int
) -> bool:
    """Seek, then decode the frames of a clip; False if that lands behind the first of them, or if the film is wrong.

    From the keyframe on the decoder must give one frame after the other with the times that the film expects: it
    gives them in the order of presentation, so that times of any other meaning come out of order.
    """
    try:
        container.seek(seek_to, stream=pictures.stream, backward=True, any_frame=False)
    except FFmpegError as error:
        check_own_fault(error, None)
        return False  # the container cannot seek
    place = -1
    for frame in _frames(container, pictures.stream):
        before, place = place, film.places.get(frame.pts, -1)
        if (
            place < 0
            or (before >= since and place != before + 1)
            or (before < since and place > pictures.positions[0])
        ):
            return False
        pictures.take(place if place >= since else None, frame)
        if place == pictures.positions[-1]:
            return True
    return False


def _read_film(
    media: dict, film: FilmIndex | None, choice: ClipChoice, size: tuple[int, int]
) -> tuple[_Pictures, FilmIndex, list[int | None] | None]:
    """The clip of a film, its index read if there is none: by seeking, or else counted from the first frame on.

    Also returns the index and, of a film that was counted, the times that all its frames carry. As long as these come
    as the index expects, reading stops at the clip's last frame; the times are None then.
    """
    with open_film(media) as container:
        film = film or read_index(container)
        positions = film.positions(choice)
        for seek_to, since in film.starts(positions[0]):
            pictures = _Pictures(positions, film, container, size)
            if _decode(container, pictures, film, seek_to, since):
                return pictures, film, None
    seen: list[int | None] = []
    with open_film(media) as container:
        pictures = _Pictures(positions, film, container, size)
        for frame in _frames(container, pictures.stream):
            pictures.take(len(seen), frame)
            seen.append(frame.pts)
            if len(seen) == positions[-1] + 1 and seen == list(film.labels[: len(seen)]):
                return pictures, film, None
    return pictures, film, seen


def _read_pictures(media: dict, choice: ClipChoice, size: tuple[int, int]) -> _Pictures:
    """The clip by what the packets say; where they do not say, or not rightly, which frame is which, by counting."""
    key = film_key(media) if _counted else None
    if (known := _counted.pop(key, None)) is not None:
        remember(_counted, key, known)
        pictures, _, labels = _read_film(media, known, choice, size)
        if labels is None:
            return pictures
        del _counted[key]
    pictures, index, labels = _read_film(media, None, choice, size)
    if labels is None:
        return pictures
    film = counted_film(index, labels)
    remember(_counted, key or film_key(media), film)
    if film.positions(choice) != index.positions(choice):
        pictures, _, labels = _read_film(media, film, choice, size)
        if labels is not None:
            raise UnusableItem("it gives other frames each time it is decoded")
    return pictures


def read_clip(
    media: dict,
    num_frames: int,
    frame_interval: int,
    height: int,
    width: int,
    uniform: float,
    fps: float | None = None,
    min_frames: int = 1,
    strict: bool = False,
    only: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Decode one clip of a video as players show it: in order, upright, with square pixels, HDR as an SDR screen does.

    Args:
        media: `{"path": str | None, "bytes": bytes | None}`, as `datasets.Video(decode=False)` gives it.
        num_frames, frame_interval, uniform, fps, min_frames, strict, only: which frames, see `ClipChoice`.
        height, width: size of the frames returned (shortest side scaled, then the centre).

    Returns:
        uint8 array (T, H, W, 3), or with `only` as many frames as it names.

    Raises:
        UnusableItem: if the video is missing, broken or has too few frames, or if its colours cannot be converted.
        MachineError: if the machine cannot read it, whose files are not to blame.
    """
    choice = ClipChoice(num_frames, frame_interval, fps, uniform, min_frames, strict, only)
    try:
        return _read_pictures(media, choice, (height, width)).clip()
    except (FFmpegError, OSError, MemoryError) as error:
        raise unusable(error, open_path(media), "the video") from error


def check_clip(media: dict, num_frames: int) -> None:
    """Raise what `read_clip` would, as far as a film's packets tell it: nothing is decoded."""
    try:
        with open_film(media) as container:
            read_index(container, oriented=False).positions(ClipChoice(num_frames, 1, None, 0.0))
    except (FFmpegError, OSError, MemoryError) as error:
        raise unusable(error, open_path(media), "the video") from error


def frame_rate(media: dict) -> float | None:
    """Frames a second of a video, by its header; None where that does not say it.

    Raises:
        UnusableItem, MachineError: as `read_clip`.
    """
    try:
        with open_film(media) as container:
            film = film_streams(container)[0]
            rate = film.average_rate or film.guessed_rate
    except (FFmpegError, OSError, MemoryError) as error:
        raise unusable(error, open_path(media), "the video") from error
    return float(rate) if rate else None
