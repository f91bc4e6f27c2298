"""From what the oracle read to numbers: outcomes per caption and seed, paired bootstrap intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .captions import Caption
from .oracle import read_video

ATTRIBUTES = ("colour", "shape", "motion", "background")
SEEN = ("identity_kept", "watermark_seen")  # yes or no of each video
MEASURED = ("wobble", "sharpness", "flicker", "displacement")
RESAMPLES = 10_000


class Metric(NamedTuple):
    """A column: how it is headed and written."""

    title: str
    percent: bool = False
    digits: int = 2

    def format(self, value: float) -> str:
        if math.isnan(value):
            return "–"
        return f"{100 * value:.1f}" if self.percent else f"{value:.{self.digits}f}"


METRICS = {
    "all_right": Metric("all right, %", percent=True),
    "colour": Metric("colour, %", percent=True),
    "shape": Metric("shape, %", percent=True),
    "motion": Metric("motion, %", percent=True),
    "background": Metric("background, %", percent=True),
    "identity_kept": Metric("identity kept, %", percent=True),
    "wobble": Metric("wobble", digits=3),
    "watermark_seen": Metric("watermark seen, %", percent=True),
    "sharpness": Metric("sharpness", digits=3),
    "flicker": Metric("flicker", digits=4),
    "displacement": Metric("displacement per frame", digits=4),
    "spread": Metric("spread of positions", digits=3),
}


def outcomes(readings: Sequence[Sequence[Mapping]], captions: Sequence[Caption]) -> dict[str, np.ndarray]:
    """What the oracle read -> one array (captions, seeds) per metric; `spread` is (captions, 1).

    Args:
        readings: per caption and seed one reading, as `read` gives it.
    """
    values = {
        attribute: np.array(
            [
                [float(r[attribute] == getattr(caption, attribute)) for r in row]
                for caption, row in zip(captions, readings)
            ]
        )
        for attribute in ATTRIBUTES
    }
    values["all_right"] = np.prod([values[attribute] for attribute in ATTRIBUTES], axis=0)
    for name in (*SEEN, *MEASURED):
        values[name] = np.array([[float(r[name]) for r in row] for row in readings])
    # only a shape that is asked to travel says anything about motion kept
    travels = np.array([caption.motion.startswith("moving") for caption in captions])
    values["displacement"][~travels] = np.nan
    positions = np.array([[r["position"] for r in row] for row in readings], dtype=float)
    values["spread"] = np.sqrt(_mean(np.square(positions - _mean(positions, 1)[:, None]), 1).sum(-1))[:, None]
    return {name: values[name] for name in METRICS}


def read(video: np.ndarray) -> dict:
    """One video uint8 (T, H, W, 3) -> what the oracle says, as plain numbers and words."""
    reading = read_video(video)
    return {
        **{attribute: getattr(reading, attribute) for attribute in ATTRIBUTES},
        **{name: bool(getattr(reading, name)) for name in SEEN},
        **{name: float(getattr(reading, name)) for name in MEASURED},
        "position": _mean(np.asarray(reading.positions, dtype=float), 0).tolist(),
    }


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    counts = known.sum(axis)
    return np.where(known, values, 0).sum(axis) / np.where(counts == 0, np.nan, counts)


def resampled_captions(count: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Indices (1 + resamples, count): the captions as they are, then drawn with replacement.

    The same rows serve every method, which makes every comparison a paired one. Whole captions are drawn, since the
    videos of one caption are no independent witnesses.
    """
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    return np.concatenate([np.arange(count)[None], drawn])


def estimates(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean of `values` (captions, seeds) over each row of captions -> (1 + resamples,); [0] is the estimate."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0).sum(1), known.sum(1)
    total = counts[rows].sum(1)
    return sums[rows].sum(1) / np.where(total == 0, np.nan, total)


def interval(draws: np.ndarray) -> tuple[float, float, float]:
    """(estimate, lower, upper) of the 95 % percentile interval."""
    usable = draws[1:][~np.isnan(draws[1:])]
    if math.isnan(draws[0]) or not len(usable):
        return (math.nan,) * 3
    low, high = np.percentile(usable, [2.5, 97.5])
    return float(draws[0]), float(low), float(high)
