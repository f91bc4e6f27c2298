"""The paper's measures and their kin: rows of a table, each a function of the features of a reference and a method."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .distances import (
    CMMD_SCALE,
    Interval,
    Kernel,
    frechet_of_moments,
    gaussian_kernel,
    kernel_sum,
    moments,
    paired_interval,
    polynomial_kernel,
    self_sum,
    unit,
)
from .motion import MEASURES

Rows = np.ndarray  # numbers of videos, some of them more than once
Score = Callable[[Rows], float]  # of one method
KID_SCALE = 1000.0


def _items(features: np.ndarray) -> np.ndarray:
    """Features of videos (N, d), or of their frames (N, T, d), as rows in float64."""
    return features.reshape(-1, features.shape[-1]).astype(np.float64)


def frechet_scores(reference: np.ndarray, covariance: str) -> Callable[[np.ndarray], Score]:
    """The Fréchet distance to a reference."""
    target = moments(_items(reference), covariance)
    return lambda features: lambda rows: frechet_of_moments(moments(_items(features[rows]), covariance), target)


def kernel_scores(reference: np.ndarray, kernel: Kernel, scale: float) -> Callable[[np.ndarray], Score]:
    """The unbiased kernel distance to a reference; the kernel is summed once for each pair of videos."""
    target = _items(reference)
    count = len(target)
    own = (kernel_sum(target, target, kernel) - self_sum(target, kernel)) / (count * (count - 1))

    def of_method(features: np.ndarray) -> Score:
        videos = [_items(video[None]) for video in features]
        everything, count_of = np.concatenate(videos), len(videos[0])
        products = (kernel(video, everything).reshape(count_of, len(videos), count_of) for video in videos)
        within = np.stack([product.sum((0, 2)) for product in products])
        self_sums = np.array([self_sum(video, kernel) for video in videos])
        across = np.array([kernel_sum(video, target, kernel) for video in videos])

        def score(rows: Rows) -> float:
            size = len(rows) * count_of
            inside = (within[np.ix_(rows, rows)].sum() - self_sums[rows].sum()) / (size * (size - 1))
            return float(scale * (inside + own - 2 * across[rows].sum() / (size * count)))

        return score

    return of_method


def _kid(reference: np.ndarray, covariance: str) -> Callable[[np.ndarray], Score]:
    return kernel_scores(reference, polynomial_kernel, KID_SCALE)


def _cmmd(reference: np.ndarray, covariance: str) -> Callable[[np.ndarray], Score]:
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
    against: Callable[[np.ndarray, str], Callable[[np.ndarray], Score]] | None
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
            columns += [Column(f"motion.{measure}", metric, None) for measure in MEASURES]
        elif metric.features == "clip":
            columns.append(Column(name, metric, "clip"))
        else:
            networks = video_networks if metric.features == "video" else frame_networks
            networks = [n for n in networks if metric.frame_network in (None, n)]
            if not networks:
                raise ValueError(f"{name} is defined on the network {metric.frame_network}: add it to --frame_network")
            columns += [Column(f"{name}.{network}", metric, network) for network in networks]
    return columns


def draws_of(score: Score, groups: Sequence[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """A method's scores (R,) on resampled captions.

    Args:
        score: of the method.
        groups: for each caption the numbers of its videos.
        drawn: (R, number of captions) numbers of captions.
    """
    return np.array([score(np.concatenate([groups[caption] for caption in captions])) for captions in drawn])


def difference(a: float, b: float, draws_a: np.ndarray, draws_b: np.ndarray) -> Interval:
    """A less B with its paired interval, from draws over the same captions."""
    return paired_interval(a - b, draws_a - draws_b)
