"""Distances against closed forms, against torchmetrics and against scipy."""

import numpy as np
import pytest
import scipy.linalg
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from diffusers_mcm.evaluation.distances import (
    cmmd,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    paired_interval,
    polynomial_kernel,
    resampled,
)


def exact_gaussian(rng, count, mean, deviations):
    """Samples whose mean and covariance are exactly those asked for."""
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    return x * deviations + mean


def known_features(count=64):
    """The two sets for which other implementations' values are known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 400))
    y = 1.2 * rng.normal(size=(count, 400)) + 0.3
    return x.astype(np.float32), y.astype(np.float32)


def test_gaussians_of_known_moments():
    rng = np.random.default_rng(1)
    x = exact_gaussian(rng, 50, np.zeros(2), np.array([1.0, 2.0]))
    y = exact_gaussian(rng, 70, np.array([1.0, -1.0]), np.array([3.0, 0.5]))
    # |(1, -1)|² + (1 - 3)² + (2 - 0.5)²
    assert frechet_distance(x, y) == pytest.approx(8.25, abs=1e-9)


@pytest.mark.parametrize("count", [5, 300], ids=["fewer rows than dimensions", "more"])
def test_a_set_against_itself_is_0(count):
    x = np.random.default_rng(2).normal(size=(count, 40))
    assert frechet_distance(x, x.copy()) == 0
    again = np.random.default_rng(0).permutation(x)  # the same moments, other roundings
    assert frechet_distance(x, again) == pytest.approx(0, abs=1e-9)


def test_values_that_other_implementations_give():
    x, y = known_features()
    assert frechet_distance(x, y) == pytest.approx(711.86546, rel=1e-6)  # torchmetrics in float64
    assert frechet_distance(x, y, "population") == pytest.approx(701.54410, rel=1e-6)  # cd-fvd's formula


@pytest.mark.parametrize("count", [64, 1000])
def test_agrees_with_torchmetrics(count):
    import torch

    x, y = (torch.from_numpy(each).double() for each in known_features(count))
    theirs = _compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x.numpy(), y.numpy()) == pytest.approx(float(theirs), rel=1e-6)


def test_agrees_with_the_root_of_a_matrix():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(80, 12)), rng.normal(size=(90, 12)) * rng.uniform(0.5, 2, 12) + 0.2
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.trace(scipy.linalg.sqrtm(a @ b)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_kid_is_that_of_torchmetrics():
    import torch

    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(120, 30)), rng.normal(size=(120, 30)) + 0.1
    theirs = poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert kernel_distance(x, y) == pytest.approx(float(theirs), abs=1e-12)


def test_the_kernel_distance_is_unbiased():
    """Its mean over many small samples of one distribution is 0, from which the biased estimate would be far."""
    rng = np.random.default_rng(5)
    found = [kernel_distance(rng.normal(size=(8, 3)), rng.normal(size=(8, 3))) for _ in range(2000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    x = rng.normal(size=(8, 3))
    left_out = np.trace(polynomial_kernel(x, x)) / 64  # about what the biased one is too large by
    assert left_out > 20 * error


def test_the_kernel_is_summed_in_blocks(monkeypatch):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(11, 4)), rng.normal(size=(13, 4))
    whole = kernel_distance(x, y)
    monkeypatch.setattr("diffusers_mcm.evaluation.distances._ROWS", 3)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_cmmd_by_hand():
    x, y = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 1.0], [0.0, 5.0]])
    # of length 1: e1, e2 against e2, e2; |e1 - e2|² = 2
    far = np.exp(-2 / 200)
    assert cmmd(x, y) == pytest.approx(1000 * (far + 1 - 2 * (2 * far + 2) / 4), rel=1e-9)
    assert gaussian_kernel(x[:1], x[:1])[0, 0] == 1


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), r"same d, got \(3, 2\) and \(3, 4\)"),
        (np.zeros((1, 2)), np.zeros((3, 2)), r"at least 2 rows, got an array of shape \(1, 2\)"),
        (np.zeros(5), np.zeros((3, 2)), r"shape \(5,\)"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "expected finite features"),
    ],
)
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_features_that_cannot_be_compared(distance, x, y, message):
    with pytest.raises(ValueError, match=message):
        distance(x, y)


def test_an_unknown_covariance():
    with pytest.raises(ValueError, match="sample, population, got 'biased'"):
        frechet_distance(np.eye(3), np.eye(3), "biased")


def test_the_interval_contains_the_estimate_whatever_the_draws_are_off_by():
    rng = np.random.default_rng(7)
    draws = rng.normal(30, 2, 4000)  # far from the estimate
    interval = paired_interval(5.0, draws)
    assert interval.estimate == 5
    assert interval.low == pytest.approx(5 - 1.96 * 2, abs=0.2) and interval.high == pytest.approx(5 + 3.92, abs=0.2)
    same = paired_interval(1.0, np.full(10, 3.0))
    assert same == (1, 1, 1)


def test_an_interval_needs_draws():
    with pytest.raises(ValueError, match=r"at least 2 resampled differences, got an array of shape \(1,\)"):
        paired_interval(0.0, [1.0])


def test_the_interval_of_a_frechet_difference_covers_it():
    """Two methods on the same captions, 40 worlds: their true difference lies within nearly all intervals."""
    rng, hits, widths, estimates = np.random.default_rng(8), 0, [], []
    reference = rng.normal(size=(2000, 4))
    truth = 0.5**2 * 4 - 0  # the second method's mean is off by 0.5 in each dimension
    for world in range(40):
        x = rng.normal(size=(150, 4))
        y = x + 0.5 + 0.1 * rng.normal(size=x.shape)
        score = [lambda rows, f=features: frechet_distance(f[rows], reference) for features in (x, y)]
        rows = resampled(150, 60, world)
        draws = [np.array([of(r) for r in rows]) for of in score]
        whole = [of(np.arange(150)) for of in score]
        interval = paired_interval(whole[1] - whole[0], draws[1] - draws[0])
        hits += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
        estimates.append(interval.estimate)
    assert hits >= 34  # of 38 expected; 33 or fewer come once in a hundred times
    # and it is not so wide that it would contain anything: conservative by no more than a factor of two
    assert np.mean(widths) < 2 * 3.92 * np.std(estimates)
