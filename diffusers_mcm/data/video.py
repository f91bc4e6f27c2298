"""Reading one clip with PyAV, decoding only what is needed for the frames that are used."""

from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from .images import UnusableItem, fit, media_file

_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class FrameTimes:
    """Presentation times of a video's frames, read off its packets without decoding.

    Attributes:
        times: ascending presentation time of every frame, in the stream's time base.
        keyframes: those among them where decoding can start.
    """

    times: tuple[int, ...]
    keyframes: tuple[int, ...]


def clip_positions(num_available: int, num_frames: int, frame_interval: int, uniform: float) -> list[int]:
    """Positions of a clip's frames: every `frame_interval`-th, from a start chosen by `uniform` in [0, 1).

    The interval shrinks to the largest one at which `num_frames` fit into `num_available`.

    Raises:
        UnusableItem: if there are fewer frames than asked for.
    """
    if num_available < num_frames:
        raise UnusableItem(f"it has {num_available} frames, fewer than the {num_frames} asked for")
    if num_frames > 1:
        frame_interval = min(frame_interval, (num_available - 1) // (num_frames - 1))
    span = (num_frames - 1) * frame_interval + 1
    start = int(uniform * (num_available - span + 1))
    return [start + i * frame_interval for i in range(num_frames)]


def _frame_times(container: av.container.InputContainer, stream: av.VideoStream) -> FrameTimes:
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard and not p.is_corrupt]
    times = sorted(p.pts for p in packets if p.pts is not None)
    if len(times) < len(packets) or len(set(times)) < len(times):
        raise UnusableItem("its packets carry no usable presentation times; remux it, for example to mp4")
    return FrameTimes(tuple(times), tuple(sorted(p.pts for p in packets if p.is_keyframe)))


def _decode(container: av.container.InputContainer, stream: av.VideoStream, wanted: Sequence[int], seek_to: int):
    """Frames at the times `wanted`, as far as decoding from the keyframe at or before `seek_to` gives them."""
    container.seek(seek_to, stream=stream, backward=True, any_frame=False)
    found, remaining = {}, set(wanted)
    for frame in container.decode(stream):
        if frame.pts in remaining:
            if frame.is_corrupt:
                raise UnusableItem(f"its frame at {float(frame.pts * stream.time_base):.2f} s is corrupt")
            found[frame.pts] = frame
            remaining.discard(frame.pts)
        if not remaining or (frame.pts is not None and frame.pts > wanted[-1]):
            break
    return found


def _wanted_frames(container, stream, index: FrameTimes, wanted: list[int]) -> list[av.VideoFrame]:
    """Seek to the last keyframe before the clip; where a container seeks inexactly, start from the beginning."""
    first = index.times[0]
    near = max((k for k in index.keyframes if k <= wanted[0]), default=first)
    for seek_to in dict.fromkeys((near, first)):
        found = _decode(container, stream, wanted, seek_to)
        if len(found) == len(wanted):
            return [found[time] for time in wanted]
    raise UnusableItem(f"only {len(found)} of the {len(wanted)} frames needed can be decoded")


def _picture(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = round(frame.rotation) % 360  # counterclockwise, as telephones store what they film upright
    if turn in _UPRIGHT:
        image = image.transpose(_UPRIGHT[turn])
    return np.asarray(fit(image, height, width))


def read_clip(
    media: dict, num_frames: int, frame_interval: int, height: int, width: int, uniform: float, min_frames: int = 1
) -> np.ndarray:
    """Decode one clip of a video.

    Args:
        media: `{"path": str | None, "bytes": bytes | None}`, as `datasets.Video(decode=False)` gives it.
        num_frames: how many frames T to return.
        frame_interval: every how many frames of the file one is taken; shrinks to fit a short video.
        height, width: size of the frames returned (shortest side scaled, then the centre).
        uniform: number in [0, 1) that chooses the start.
        min_frames: a video of fewer frames is refused even where `num_frames` are fewer still.

    Returns:
        uint8 array (T, H, W, 3).

    Raises:
        UnusableItem: if the video is missing, broken or shorter than `num_frames` or `min_frames` frames.
    """
    try:
        with av.open(media_file(media), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UnusableItem("it has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnusableItem("its codec is unknown, or its header is damaged")
            stream.codec_context.thread_count = 1  # the workers of the loader are the parallelism
            index = _frame_times(container, stream)
            clip_positions(len(index.times), min_frames, 1, uniform)
            positions = clip_positions(len(index.times), num_frames, frame_interval, uniform)
            wanted = [index.times[p] for p in positions]
            frames = _wanted_frames(container, stream, index, wanted)
            return np.stack([_picture(frame, height, width) for frame in frames])
    except (FFmpegError, OSError) as error:
        raise UnusableItem(f"the video cannot be read ({type(error).__name__}: {error})") from error
