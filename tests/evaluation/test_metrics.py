"""The table of metrics: scores on all videos are the distances, and rows choose videos."""

import numpy as np
import pytest

from diffusers_mcm.evaluation.distances import cmmd, frechet_distance, kernel_distance
from diffusers_mcm.evaluation.metrics import METRICS, columns_of, difference, draws_of, mean_score

RNG = np.random.default_rng(0)
REFERENCE, METHOD = RNG.normal(size=(30, 4, 5)), RNG.normal(size=(20, 4, 5)) + 0.3  # frames of videos
ALL = np.arange(20)


def flat(features):
    return features.reshape(-1, features.shape[-1])


def score(name):
    return METRICS[name].against(REFERENCE, "sample")(METHOD)


def test_a_frechet_score_is_the_distance_of_all_frames():
    assert score("fid")(ALL) == pytest.approx(frechet_distance(flat(METHOD), flat(REFERENCE)), rel=1e-10)
    half = np.arange(10)
    assert score("fid")(half) == pytest.approx(frechet_distance(flat(METHOD[:10]), flat(REFERENCE)), rel=1e-10)


def test_the_covariance_is_handed_on():
    population = METRICS["fvd"].against(REFERENCE[:, 0], "population")(METHOD[:, 0])(ALL)
    assert population == pytest.approx(frechet_distance(METHOD[:, 0], REFERENCE[:, 0], "population"), rel=1e-10)
    assert population != pytest.approx(METRICS["fvd"].against(REFERENCE[:, 0], "sample")(METHOD[:, 0])(ALL), rel=1e-4)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(
    "name, distance", [("kid", lambda x, y: 1000 * kernel_distance(x, y)), ("cmmd", cmmd)], ids=["kid", "cmmd"]
)
def test_a_kernel_score_is_the_distance_of_all_frames(name, distance, frames):
    """Every pair of frames counts, those of one video too: as torchmetrics, which test_distances.py compares with."""
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(count, 1, 5)) + 0.1 * each[:, :frames] for count, each in ((20, METHOD), (30, REFERENCE)))
    of = METRICS[name].against(y, "sample")(x)
    assert of(ALL) == pytest.approx(distance(flat(x), flat(y)), rel=1e-9)
    rows = np.array([3, 7, 11, 12])
    assert of(rows) == pytest.approx(distance(flat(x[rows]), flat(y)), rel=1e-9)
    twice = np.array([3, 3, 8])
    assert of(twice) == pytest.approx(distance(flat(x[twice]), flat(y)), rel=1e-9)


@pytest.mark.parametrize("covariance", ["sample", "population"])
@pytest.mark.parametrize("rows", [ALL, np.array([0, 0, 3, 3, 3, 9]), np.arange(3)], ids=["all", "twice", "few"])
def test_the_fast_way_of_resampled_sets_gives_the_same(covariance, rows):
    fid = METRICS["fid"].against(REFERENCE, covariance)(METHOD)
    assert fid.draw(rows) == pytest.approx(fid(rows), rel=1e-6)
    wide = METRICS["fvd"].against(RNG.normal(size=(30, 50)), covariance)(RNG.normal(size=(20, 50)))
    assert wide.draw(rows) == pytest.approx(wide(rows), rel=1e-6)  # fewer rows than dimensions


def test_columns_are_a_metric_on_a_network_each_and_motion_always():
    keys = [column.key for column in columns_of(["fvd", "clipsim"], ["i3d", "vjepa2"], ["dinov2"])]
    assert keys == ["fvd.i3d", "fvd.vjepa2", "clipsim", "motion.change", "motion.near_still", "motion.flicker"]


def test_titles_and_digits():
    fvd, *_, still, _ = columns_of(["fvd"], ["i3d"], [])
    assert (fvd.title, still.title) == ("FVD (i3d)", "near still")
    assert (fvd.format(501.26), still.format(0.5), fvd.format(float("nan"))) == ("501.3", "0.500", "–")


def test_cmmd_is_defined_on_clip():
    assert [c.key for c in columns_of(["cmmd"], [], ["dinov2", "clip"])][0] == "cmmd.clip"
    with pytest.raises(ValueError, match="cmmd is defined on the network clip: add it to --frame_network"):
        columns_of(["cmmd"], [], ["dinov2"])


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="out of fvd, kvd, clipsim, fid, kid, cmmd, motion, got 'lpips'"):
        columns_of(["lpips"], [], [])


def test_draws_take_all_videos_of_a_caption():
    groups = [np.array([0, 1]), np.array([2])]
    of = mean_score(np.array([1.0, 3.0, 8.0]))
    assert draws_of(of, groups, np.array([[0, 0], [0, 1], [1, 1]])).tolist() == [2, 4, 8]


def test_a_difference_is_paired():
    """Two methods that share all their noise: the difference is certain though either score is not."""
    noise = RNG.normal(size=1000)
    apart = difference(6.0, 5.0, noise + 6, noise + 5)
    assert apart.high - apart.low < 1e-9 and apart.estimate == 1
