"""Which frames of a film make a clip: by number, or by the times at which they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .faults import UnusableItem

#: Frames may be decoded so many places away from where they are shown (H.264 and HEVC allow 16).
MAX_REORDERING = 16


def _check_enough(num_available: int, num_frames: int) -> None:
    if num_available < num_frames:
        raise UnusableItem(f"it has {num_available} frames, fewer than the {num_frames} asked for")


def clip_positions(num_available: int, num_frames: int, frame_interval: int, uniform: float) -> list[int]:
    """Positions of a clip's frames: every `frame_interval`-th, from a start chosen by `uniform` in [0, 1).

    The interval shrinks to the largest one at which `num_frames` fit into `num_available`.

    Raises:
        UnusableItem: if there are fewer frames than asked for.
    """
    _check_enough(num_available, num_frames)
    if num_frames > 1:
        frame_interval = min(frame_interval, (num_available - 1) // (num_frames - 1))
    span = (num_frames - 1) * frame_interval + 1
    start = int(uniform * (num_available - span + 1))
    return [start + i * frame_interval for i in range(num_frames)]


def timed_clip_positions(seconds: Sequence[float], num_frames: int, fps: float, uniform: float) -> list[int]:
    """Positions of the frames that are shown every 1/fps seconds, from a start chosen by `uniform` in [0, 1).

    The clip begins with the frame shown at a time that is uniform over the film. A moment shows the last frame whose
    time is not after it, times being met to within half a frame: containers round them. So a frame that stays for
    longer than 1/fps comes more than once. Where the film is shorter than the clip, the clip's frames lie closer
    together, from the first frame of the film to its last.

    Args:
        seconds: ascending times of all frames of the film.
        num_frames: how many frames T to choose.
        fps: frames per second of the clip.

    Raises:
        UnusableItem: if the film has fewer frames than asked for.
    """
    _check_enough(len(seconds), num_frames)
    since = np.asarray(seconds, dtype=np.float64) - float(seconds[0])
    gap = float(np.median(np.diff(since))) if len(since) > 1 else 0.0
    step = min(1 / fps, since[-1] / (num_frames - 1)) if num_frames > 1 else 0.0
    slack = min(gap, step) / 2
    last_start = since[-1] - step * (num_frames - 1)
    start_time = min(
        uniform * (last_start + gap), last_start + slack
    )  # the last start lasts for a frame, as others do
    start = since[np.searchsorted(since, start_time, side="right") - 1]
    moments = start + step * np.arange(num_frames) + slack
    return (np.searchsorted(since, moments, side="right") - 1).tolist()


@dataclass(frozen=True)
class ClipChoice:
    """What clip is wanted of a film: T frames, every n-th or (if `fps` is given) at a rate, from a random start.

    Attributes:
        num_frames: T.
        frame_interval: n; shrinks to fit a short film.
        fps: frames per second; None takes every n-th frame.
        uniform: number in [0, 1) that chooses the start.
        min_frames: a film of fewer frames is refused even where T are fewer still.
    """

    num_frames: int
    frame_interval: int
    fps: float | None
    uniform: float
    min_frames: int = 1

    def positions(self, times: Sequence[int], time_base: Fraction) -> list[int]:
        """Where the clip's frames stand among the frames of the film, which are shown at `times` · `time_base`."""
        _check_enough(len(times), self.min_frames)
        if self.fps is None:
            return clip_positions(len(times), self.num_frames, self.frame_interval, self.uniform)
        seconds = [float(time * time_base) for time in times]
        return timed_clip_positions(seconds, self.num_frames, self.fps, self.uniform)


def times_in_output_order(
    pts: Sequence[int | None], time_base: Fraction, rate: Fraction | None
) -> list[int] | list[Fraction]:
    """Ascending times of frames that are given in the order in which they are shown, in the unit `time_base`.

    Some containers (AVI) label frames by the order in which they are decoded: the labels are right as a set. Where
    labels are missing or of no use, the frames are taken to follow one another at `rate` per second.
    """
    if None not in pts and len(set(pts)) == len(pts):
        order = np.argsort(np.argsort(pts))
        if np.abs(order - np.arange(len(pts))).max(initial=0) <= MAX_REORDERING:
            return sorted(pts)
    return at_constant_rate(len(pts), time_base, rate)


def at_constant_rate(num_frames: int, time_base: Fraction, rate: Fraction | None) -> list[Fraction]:
    """Times of frames at `rate` per second (25 if that is unknown), in the unit `time_base`."""
    step = 1 / ((rate or Fraction(25)) * time_base)
    return [number * step for number in range(num_frames)]
