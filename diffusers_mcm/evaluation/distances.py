"""Distances between two sets of features, and the intervals of their differences, in float64."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COVARIANCES = ("sample", "population")
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper that proposed it, arXiv 2401.09603
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
_ROWS = 2048  # of a kernel matrix that are held at one time


class Interval(NamedTuple):
    """An estimate and its 95 % interval, which always contains it."""

    estimate: float
    low: float
    high: float


def _features(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"expected features (N, d) of at least 2 rows, got an array of shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("expected finite features, got NaN or infinity")
    return x


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = _features(x), _features(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two sets of features (N, d) with the same d, got {x.shape} and {y.shape}")
    return x, y


class Moments(NamedTuple):
    """The mean (d,) of a set of features, and a factor (k, d), k at most d, whose own product is the covariance."""

    mean: np.ndarray
    factor: np.ndarray


def moments(x: np.ndarray, covariance: str = "sample") -> Moments:
    """Of features (N, d), N at least 2; `covariance` as in `frechet_distance`."""
    if covariance not in COVARIANCES:
        raise ValueError(f"expected covariance to be one of {', '.join(COVARIANCES)}, got {covariance!r}")
    x = _features(x)
    mean = x.mean(0)
    factor = (x - mean) / math.sqrt(len(x) - (covariance == "sample"))
    return Moments(mean, np.asarray(np.linalg.qr(factor, mode="r")) if len(x) > x.shape[1] else factor)


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians, see `frechet_distance`."""
    if a is b or all(map(np.array_equal, a, b)):
        return 0.0
    root = np.linalg.norm(a.factor @ b.factor.T, ord="nuc")
    spread = (a.factor**2).sum() + (b.factor**2).sum() - 2 * root
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def frechet_distance(x: np.ndarray, y: np.ndarray, covariance: str = "sample") -> float:
    """The squared Fréchet distance of two Gaussians with the moments of two sets of features.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), as FID (Heusel et al. 2017) and FVD (Unterthiner et al. 2018) take it. With
    Σ₁ = AᵀA and Σ₂ = BᵀB the trace of the root is the sum of the singular values of ABᵀ: no root of a matrix is taken,
    nothing is added to a diagonal, and fewer rows than dimensions are no harm. A set against itself gives 0.

    Args:
        x, y: features (N, d) and (M, d), N and M at least 2.
        covariance: "sample" divides by N − 1, "population" by N, as StyleGAN-V and cd-fvd do.

    Raises:
        ValueError: for shapes that do not belong together, values that are not finite, or another `covariance`.
    """
    x, y = _pair(x, y)
    return frechet_of_moments(moments(x, covariance), moments(y, covariance))


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(xᵀy/d + 1)³, of KID (Bińkowski et al. 2018): (N, d), (M, d) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, sigma: float = CMMD_SIGMA) -> np.ndarray:
    """exp(−|x − y|²/2σ²), of CMMD (Jayasumana et al. 2024): (N, d), (M, d) -> (N, M)."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * sigma**2))


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, d) brought to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def kernel_sum(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """The sum of a kernel's matrix, a few rows of it at a time."""
    return float(sum(kernel(x[start : start + _ROWS], y).sum() for start in range(0, len(x), _ROWS)))


def kernel_distance(x: np.ndarray, y: np.ndarray, kernel: Kernel = polynomial_kernel) -> float:
    """The unbiased squared maximum mean discrepancy of two sets of features; it may come out below 0.

    Args:
        x, y: features (N, d) and (M, d), N and M at least 2.
        kernel: takes two sets of rows and gives the matrix of their products.

    Raises:
        ValueError: as `frechet_distance`.
    """
    x, y = _pair(x, y)
    within = sum(
        (kernel_sum(rows, rows, kernel) - self_sum(rows, kernel)) / (len(rows) * (len(rows) - 1)) for rows in (x, y)
    )
    return within - 2 * kernel_sum(x, y, kernel) / (len(x) * len(y))


def self_sum(x: np.ndarray, kernel: Kernel) -> float:
    """The trace of a kernel's matrix: what the unbiased estimate leaves out."""
    return float(sum(kernel(row[None], row[None])[0, 0] for row in x))


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of two sets of CLIP image embeddings (N, d): 1000 × the unbiased distance, of embeddings of length 1."""
    return CMMD_SCALE * kernel_distance(unit(x), unit(y), gaussian_kernel)


def resampled(count: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Row numbers (resamples, count) of captions drawn with replacement; the same ones serve every method."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def paired_interval(estimate: float, draws: Sequence[float] | np.ndarray) -> Interval:
    """The 95 % interval of a difference between two methods, from its values on resampled captions.

    A caption that is drawn twice takes rank from the covariance, so a Fréchet distance of resampled captions is too
    large, and its percentiles may leave the estimate outside. The excess is alike in two methods on the same captions,
    and its mean is taken off: what is left is how far the difference strays around its own value.
    """
    draws = np.asarray(draws, dtype=np.float64)
    if draws.ndim != 1 or len(draws) < 2:
        raise ValueError(f"expected at least 2 resampled differences, got an array of shape {draws.shape}")
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return Interval(float(estimate), float(estimate + min(low, 0)), float(estimate + max(high, 0)))
