"""Reading one clip with PyAV, decoding only what is needed for the frames that are used."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.error import FFmpegError

from .film import FilmIndex, open_film, read_index, read_packets
from .frames import ShownFrame, orientation_of, picture
from .faults import UnusableItem, check_own_fault, unusable
from .images import open_path
from .timing import ClipChoice, clip_positions, timed_clip_positions, times_in_output_order

__all__ = ["clip_positions", "read_clip", "timed_clip_positions"]


class _Contradiction(Exception):
    """The decoder gives other frames than the packets promise."""


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames in the order in which they are shown, from the next keyframe on."""
    started = False
    for packet in read_packets(container, stream):
        started = started or packet.is_keyframe or not packet.size
        if started:
            yield from packet.decode()


def _decode(
    container: av.container.InputContainer, index: FilmIndex, positions: Sequence[int], seek_to: int, since: int
) -> list[ShownFrame] | None:
    """Seek, then decode the frames at `positions`; None if that lands behind the first of them.

    From the time `since` on the decoder must give one frame after the other as the packets promise: it gives them in
    the order of presentation, so that times which mean anything else come out of order.

    Raises:
        _Contradiction: if it does not.
    """
    stream, times = container.streams[index.stream], index.times
    try:
        container.seek(seek_to, stream=stream, backward=True, any_frame=False)
    except FFmpegError as error:
        check_own_fault(error, None)
        return None  # the container cannot seek
    found, expected, wanted, orientation = {}, None, set(positions), index.orientation
    for frame in _frames(container, stream):
        orientation = orientation_of(frame) or orientation
        if frame.pts is None:
            raise _Contradiction
        if expected is None:
            if frame.pts < since:
                continue
            if frame.pts > times[positions[0]]:
                return None
            expected = bisect_left(times, frame.pts)
        if frame.pts != times[expected]:
            raise _Contradiction
        if expected in wanted:
            found[expected] = ShownFrame.of(frame, stream, orientation)
        expected += 1
        if expected > positions[-1]:
            return [found[position] for position in positions]  # by time, one may come more than once
    raise _Contradiction


def _decode_by_seeking(
    container: av.container.InputContainer, index: FilmIndex, choice: ClipChoice
) -> list[ShownFrame] | None:
    """The clip, from the keyframe before it; None if no seeking leads there."""
    positions = choice.positions(index.times, index.time_base)
    try:
        for seek_to, since in index.starts(index.times[positions[0]]):
            found = _decode(container, index, positions, seek_to, since)
            if found is not None:
                return found
    except _Contradiction:
        pass  # decoding from the start numbers the frames as they come
    return None


def _decode_from_start(
    media: dict, index: FilmIndex, positions: Sequence[int], believed: Sequence[int | None]
) -> tuple[list[ShownFrame], list[int | None] | None]:
    """Frames at `positions`, counted from the first one decoded, and the times of all frames.

    As long as the frames come with the times `believed`, reading stops at the last position; the times are None then.
    """
    seen, found, wanted, orientation, as_believed = [], {}, set(positions), index.orientation, True
    with open_film(media) as container:
        stream = container.streams[index.stream]
        for frame in _frames(container, stream):
            orientation = orientation_of(frame) or orientation
            if len(seen) in wanted:
                found[len(seen)] = ShownFrame.of(frame, stream, orientation)
            as_believed = as_believed and len(seen) < len(believed) and frame.pts == believed[len(seen)]
            if as_believed and len(seen) == positions[-1]:
                return [found[position] for position in positions], None
            seen.append(frame.pts)
    return [found[position] for position in positions if position in found], seen


def _decode_by_counting(media: dict, index: FilmIndex, choice: ClipChoice) -> list[ShownFrame]:
    """The clip of a film whose packets do not say where its frames are, or not rightly."""
    positions = choice.positions(index.times, index.time_base)
    found, times = _decode_from_start(media, index, positions, index.times if index.sound else [])
    if times is None:
        return found
    right = choice.positions(times_in_output_order(times, index.time_base, index.rate), index.time_base)
    if right == positions:
        return found
    found, times = _decode_from_start(media, index, right, times)
    if times is not None:
        raise UnusableItem("it gives other frames each time it is decoded")
    return found


def _clip_frames(media: dict, choice: ClipChoice) -> list[ShownFrame]:
    with open_film(media) as container:
        index = read_index(container)
        found = _decode_by_seeking(container, index, choice) if index.sound else None
    if found is None:
        found = _decode_by_counting(media, index, choice)
    for frame in (shown.frame for shown in found):
        if frame.is_corrupt:
            raise UnusableItem(f"its frame{'' if frame.time is None else f' at {frame.time:.2f} s'} is corrupt")
    return found


def read_clip(
    media: dict,
    num_frames: int,
    frame_interval: int,
    height: int,
    width: int,
    uniform: float,
    fps: float | None = None,
    min_frames: int = 1,
) -> np.ndarray:
    """Decode one clip of a video as players show it: in order, upright, with square pixels, HDR as an SDR screen does.

    Args:
        media: `{"path": str | None, "bytes": bytes | None}`, as `datasets.Video(decode=False)` gives it.
        num_frames: how many frames T to return.
        frame_interval: every how many frames of the file one is taken; shrinks to fit a short video.
        height, width: size of the frames returned (shortest side scaled, then the centre).
        uniform: number in [0, 1) that chooses the start.
        fps: if given, frames are taken at this rate by the times at which they are shown, whatever `frame_interval`
            is: see `timed_clip_positions`.
        min_frames: a film of fewer frames is refused even where `num_frames` are fewer still.

    Returns:
        uint8 array (T, H, W, 3).

    Raises:
        UnusableItem: if the video is missing, broken or shorter than `num_frames` or `min_frames` frames, or
            if its colours cannot be converted.
        MachineError: if the machine cannot read it, whose files are not to blame.
    """
    choice = ClipChoice(num_frames, frame_interval, fps, uniform, min_frames)
    try:
        return np.stack([picture(shown, height, width) for shown in _clip_frames(media, choice)])
    except (FFmpegError, OSError, MemoryError) as error:
        raise unusable(error, open_path(media), "the video") from error
