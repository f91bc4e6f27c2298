"""Which frames of a film make a clip: by number, or by the times at which they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .faults import UnusableItem

Time = int | float | Fraction  # in units of a stream's time base

#: Frames may be decoded so many places away from where they are shown (H.264 and HEVC allow 16).
MAX_REORDERING = 16
_USABLE = 0.9  # share of the labels that must be in place for these to be believed
_USUAL_RATE = Fraction(25)


def _check_enough(num_available: int, num_frames: int) -> None:
    if num_available < num_frames:
        raise UnusableItem(f"it has {num_available} frames, fewer than the {num_frames} asked for")


def clip_positions(num_available: int, num_frames: int, frame_interval: int, uniform: float) -> list[int]:
    """Positions of a clip's frames: every `frame_interval`-th, from a start chosen by `uniform` in [0, 1).

    The interval shrinks to the largest one at which `num_frames` fit into `num_available`; `UnusableItem` if none.
    """
    _check_enough(num_available, num_frames)
    if num_frames > 1:
        frame_interval = min(frame_interval, (num_available - 1) // (num_frames - 1))
    span = (num_frames - 1) * frame_interval + 1
    start = int(uniform * (num_available - span + 1))
    return [start + i * frame_interval for i in range(num_frames)]


def timed_clip_positions(
    seconds: Sequence[float],
    num_frames: int,
    fps: float,
    uniform: float,
    end: float | None = None,
    strict: bool = False,
) -> list[int]:
    """Positions of the frames that are shown every 1/fps seconds, from a start chosen by `uniform` in [0, 1).

    The clip begins with the frame shown at a time that is uniform over the film. A moment shows the last frame whose
    time is not after it, times being met to within half a frame: containers round them. So a frame that stays for
    longer than 1/fps comes more than once, the last one too. Where the film is shorter than the clip, the clip's
    frames lie closer together, from the first frame of the film to its last, or if `strict` the film is refused.
    `seconds` are the ascending times of all its frames; the last one is shown until `end`, or by default as long as
    most frames are. `UnusableItem` if the film has fewer frames than asked for.
    """
    _check_enough(len(seconds), num_frames)
    since = np.asarray(seconds, dtype=np.float64) - float(seconds[0])
    gap = float(np.median(np.diff(since))) if len(since) > 1 else 0.0
    # A writer's mistakes in the last frame's duration may be hours: it counts as no longer than all before it.
    stays = gap if end is None else min(max(float(end) - float(seconds[-1]), 0.0), since[-1])
    length, reach = since[-1] + stays, since[-1] + max(stays - gap, 0.0)
    steps = num_frames - 1
    fits = steps / fps < reach + gap / 2
    if strict and not fits:
        raise UnusableItem(f"it lasts {length:.3g} s, too short for {num_frames} frames at {fps:g} per second")
    step = 0.0 if not steps else 1 / fps if fits else reach / steps
    slack = min(gap, step) / 2
    # The last start lasts for a frame, as others do; rounded times are not to make one more of it.
    start_time = max(min(uniform * (length - step * steps), reach - step * steps + slack), 0.0)
    start = since[np.searchsorted(since, start_time, side="right") - 1]
    moments = start + step * np.arange(num_frames) + slack
    return (np.searchsorted(since, moments, side="right") - 1).tolist()


@dataclass(frozen=True)
class ClipChoice:
    """The clip that is wanted of a film: T frames, every n-th or (given `fps`) at a rate, from a random start."""

    num_frames: int  # T
    frame_interval: int  # n; shrinks to fit a short film
    fps: float | None  # the rate, by the times at which frames are shown; None takes every n-th frame
    uniform: float  # number in [0, 1) that chooses the start
    min_frames: int = 1  # a film of fewer frames is refused even where T are fewer still
    strict: bool = False  # refuse a film that is too short for the clip at that interval or rate
    only: tuple[int, ...] | None = None  # ascending: of the T frames these alone are wanted

    def positions(self, times: Sequence[Time], time_base: Fraction, end: int | None = None) -> list[int]:
        """Where the wanted frames stand among the frames of the film, shown at `times` · `time_base` until `end`."""
        positions = self._clip_positions(times, time_base, end)
        return positions if self.only is None else [positions[place] for place in self.only]

    def _clip_positions(self, times: Sequence[Time], time_base: Fraction, end: int | None) -> list[int]:
        span = (self.num_frames - 1) * self.frame_interval + 1 if self.strict and self.fps is None else 1
        _check_enough(len(times), max(self.min_frames, span))
        if self.fps is None:
            return clip_positions(len(times), self.num_frames, self.frame_interval, self.uniform)
        seconds = [float(time * time_base) for time in times]
        until = None if end is None else float(end * time_base)
        return timed_clip_positions(seconds, self.num_frames, self.fps, self.uniform, until, self.strict)


def times_in_output_order(pts: Sequence[int | None], time_base: Fraction, rate: Fraction | None) -> Sequence[Time]:
    """Ascending times of frames that are given in the order in which they are shown, in the unit `time_base`.

    Some containers (AVI) label frames by the order in which they are decoded: the labels are right as a set. A frame
    whose label is missing, another's or far from its place is taken to be shown evenly between those beside it. Where
    most labels are of no use, the frames are taken to follow one another at `rate` per second.
    """
    labels = _labels_in_order(pts)
    if labels is None:
        return at_constant_rate(len(pts), time_base, rate)
    times, places = sorted(labels.values()), list(labels)
    if len(times) == len(pts):
        return times
    gaps = sorted(np.diff(times) / np.diff(places))
    numbers = np.arange(len(pts))
    beyond = np.minimum(numbers - places[0], 0) + np.maximum(numbers - places[-1], 0)
    return (np.interp(numbers, places, times) + gaps[len(gaps) // 2] * beyond).tolist()


def _labels_in_order(pts: Sequence[int | None]) -> dict[int, int] | None:
    """The labels that can be used, by their places; None if one cannot tell."""
    first: dict[int, int] = {}
    for place, label in enumerate(pts):
        if label is not None:
            first.setdefault(label, place)
    labels, labelled = {place: label for label, place in first.items()}, sum(label is not None for label in pts)
    for _ in range(2):  # without those that are far away the others may be in place
        ranks = np.argsort(np.argsort(list(labels.values())))
        distances = np.abs(ranks - np.arange(len(labels)))
        if distances.max(initial=0) <= MAX_REORDERING:
            break
        near = (distances <= MAX_REORDERING).tolist()
        labels = {place: label for (place, label), is_near in zip(labels.items(), near) if is_near}
    else:
        return None
    return labels if len(labels) >= max(2, _USABLE * labelled) else None


def at_constant_rate(num_frames: int, time_base: Fraction, rate: Fraction | None) -> list[Fraction]:
    """Times of frames at `rate` per second (25 if that is unknown), in the unit `time_base`."""
    step = 1 / ((rate or _USUAL_RATE) * time_base)
    return [number * step for number in range(num_frames)]
