"""The paper's measures and their kin: rows of a table, each a function of the features of a reference and a method."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .distances import (
    CMMD_SCALE,
    Interval,
    Kernel,
    Moments,
    frechet_of_moments,
    gaussian_kernel,
    moments,
    paired_interval,
    polynomial_kernel,
    self_sum,
    unit,
)
from .motion import MEASURES

Rows = np.ndarray  # numbers of videos, some of them more than once
Score = Callable[[Rows], float]  # of one method
Against = Callable[[np.ndarray], Score]  # a reference: a method's features -> its score
KID_SCALE = 1000.0
ESTIMATOR = "unbiased, every two different rows a pair, frames of one video among them"  # of kernel distances


def _items(features: np.ndarray) -> np.ndarray:
    """Features of videos (N, d), or of their frames (N, T, d), as rows in float64."""
    return features.reshape(-1, features.shape[-1]).astype(np.float64)


class FrechetScore:
    """The Fréchet distance of a method's features (N, d) or (N, T, d) to a reference's."""

    def __init__(self, target: Moments, features: np.ndarray, covariance: str):
        self.target, self.features, self.covariance = target, features, covariance

    def __call__(self, rows: Rows) -> float:
        """Of the videos of these numbers."""
        return frechet_of_moments(moments(_items(self.features[rows]), self.covariance), self.target)

    def draw(self, rows: Rows) -> float:
        """The same to a millionth, in a quarter of the time, for the many resampled sets of an interval.

        The covariance comes from one weighted product, and tr√(Σ₁Σ₂) from the eigenvalues of BΣ₁Bᵀ, where Σ₂ = BᵀB.
        """
        numbers, times = np.unique(rows, return_counts=True)
        items = _items(self.features[numbers])
        weights = np.repeat(times, len(items) // len(numbers)).astype(np.float64)
        count = weights.sum()
        mean = weights @ items / count
        scaled = (items - mean) * np.sqrt(weights / (count - (self.covariance == "sample")))[:, None]
        across = scaled @ self.target.factor.T
        small = across.T @ across if across.shape[0] > across.shape[1] else across @ across.T
        root = np.sqrt(np.maximum(np.linalg.eigvalsh(small), 0)).sum()
        spread = (scaled**2).sum() + (self.target.factor**2).sum() - 2 * root
        return float(((mean - self.target.mean) ** 2).sum() + spread)


def frechet_scores(reference: np.ndarray, covariance: str) -> Against:
    """The Fréchet distance to a reference."""
    target = moments(_items(reference), covariance)
    return lambda features: FrechetScore(target, features, covariance)


def kernel_scores(reference: np.ndarray, kernel: Kernel, scale: float) -> Against:
    """The unbiased kernel distance to a reference, of videos (N, d) or of all their frames (N, T, d).

    Every two different rows are a pair, as in `kernel_distance` and in others' codes, frames of one video among them.
    The kernel is summed once for each pair of videos.
    """
    target = _by_video(reference)
    own = _unbiased(_sums(target, target, kernel), _traces(target, kernel), target.shape[1])

    def of_method(features: np.ndarray) -> Score:
        videos = _by_video(features)
        count = videos.shape[1]
        within, traces = _sums(videos, videos, kernel), _traces(videos, kernel)
        across = _sums(videos, target, kernel).mean(1) / (count * target.shape[1])
        return lambda rows: float(
            scale * (_unbiased(within[np.ix_(rows, rows)], traces[rows], count) + own - 2 * across[rows].mean())
        )

    return of_method


def _by_video(features: np.ndarray) -> np.ndarray:
    """(N, T, d) in float64; T is 1 where a video has one feature."""
    return features.reshape(len(features), -1, features.shape[-1]).astype(np.float64)


def _sums(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> np.ndarray:
    """The kernel summed over the frames of each pair of videos: (N, T, d), (M, S, d) -> (N, M)."""
    rows = b.reshape(-1, b.shape[-1])
    return np.stack([kernel(video, rows).sum(0).reshape(len(b), -1).sum(1) for video in a])


def _traces(videos: np.ndarray, kernel: Kernel) -> np.ndarray:
    """The kernel of each frame with itself, summed over each video (N,)."""
    return np.array([self_sum(video, kernel) for video in videos])


def _unbiased(sums: np.ndarray, traces: np.ndarray, frames: int) -> float:
    """The mean of the kernel's matrix of all frames without its diagonal, from its sums for each pair of videos."""
    count = len(sums) * frames
    return float((sums.sum() - traces.sum()) / (count * (count - 1)))


def _kid(reference: np.ndarray, covariance: str) -> Against:
    return kernel_scores(reference, polynomial_kernel, KID_SCALE)


def _cmmd(reference: np.ndarray, covariance: str) -> Against:
    scores = kernel_scores(unit(reference), gaussian_kernel, CMMD_SCALE)
    return lambda features: scores(unit(features))


def mean_score(values: np.ndarray) -> Score:
    """The mean over videos of one value (N,) each."""
    return lambda rows: float(values[rows].mean())


class Metric(NamedTuple):
    """A row of the table of metrics.

    Attributes:
        title: its column's.
        features: "video", "frame", "clip" (the CLIP that reads captions) or None, where no network is needed.
        against: (reference's features, covariance) -> (a method's features) -> its score; None for what needs no
            reference.
        better: "lower", "higher", or "" where neither is.
        digits: after the point.
        frame_network: the one it is defined on, where it is one alone.
    """

    title: str
    features: str | None
    against: Callable[[np.ndarray, str], Against] | None
    better: str
    digits: int
    frame_network: str | None = None


METRICS = {
    "fvd": Metric("FVD", "video", frechet_scores, "lower", 1),
    "kvd": Metric("KVD x1000", "video", _kid, "lower", 2),
    "clipsim": Metric("CLIPSIM", "clip", None, "higher", 2),
    "fid": Metric("FID", "frame", frechet_scores, "lower", 2),
    "kid": Metric("KID x1000", "frame", _kid, "lower", 2),
    "cmmd": Metric("CMMD", "frame", _cmmd, "lower", 2, "clip"),
    "motion": Metric("motion", None, None, "", 3),
}
DEFAULT = ("fvd", "clipsim", "fid", "motion")


class Column(NamedTuple):
    """One column of the results: a metric on the features of one network."""

    key: str  # such as fvd.i3d, clipsim, motion.change
    metric: Metric
    network: str | None

    @property
    def title(self) -> str:
        """What stands above it."""
        if self.metric.features in ("video", "frame"):
            return f"{self.metric.title} ({self.network})"
        return self.key.partition(".")[2].replace("_", " ") or self.metric.title

    def format(self, value: float) -> str:
        """A value, to as many digits as mean something."""
        return "–" if np.isnan(value) else f"{value:.{self.metric.digits}f}"


def columns_of(metrics: Sequence[str], video_networks: Sequence[str], frame_networks: Sequence[str]) -> list[Column]:
    """The columns of the metrics asked for, motion's always among them: a still video raises CLIPSIM.

    Raises:
        ValueError: for an unknown metric, and for one whose network was not asked for.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"expected metrics out of {', '.join(METRICS)}, got {unknown[0]!r}")
    columns = []
    for name, metric in METRICS.items():
        if name not in (*metrics, "motion"):
            continue
        if name == "motion":
            columns += [column_of(f"motion.{measure}") for measure in MEASURES]
        elif metric.features == "clip":
            columns.append(column_of(name))
        else:
            networks = video_networks if metric.features == "video" else frame_networks
            networks = [n for n in networks if metric.frame_network in (None, n)]
            if not networks:
                raise ValueError(f"{name} is defined on the network {metric.frame_network}: add it to --frame_network")
            columns += [column_of(f"{name}.{network}") for network in networks]
    return columns


def column_of(key: str) -> Column:
    """`fvd.i3d`, `clipsim`, `motion.change` -> the column."""
    name, _, rest = key.partition(".")
    return Column(key, METRICS[name], "clip" if METRICS[name].features == "clip" else rest or None)


def draws_of(score: Score, groups: Sequence[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """A method's scores (R,) on resampled captions.

    Args:
        score: of the method.
        groups: for each caption the numbers of its videos.
        drawn: (R, number of captions) numbers of captions.
    """
    draw = getattr(score, "draw", score)
    return np.array([draw(np.concatenate([groups[caption] for caption in captions])) for captions in drawn])


def difference(a: float, b: float, draws_a: np.ndarray, draws_b: np.ndarray) -> Interval:
    """A less B with its paired interval, from draws over the same captions."""
    return paired_interval(a - b, draws_a - draws_b)
