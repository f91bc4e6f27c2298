import math

import numpy as np
import pytest

from diffusers_mcm.shapes.captions import held_out_captions, parse
from diffusers_mcm.shapes.render import render_video
from diffusers_mcm.shapes.scores import (
    METRICS,
    Metric,
    estimates,
    interval,
    outcomes,
    read,
    resampled_captions,
)

MOVING = parse("a red circle moving left on a black background")
GROWING = parse("a blue square growing on a white background")


def reading(caption, position=(0.5, 0.5), **changes):
    words = caption._asdict()
    numbers = {"sharpness": 0.4, "flicker": 0.01, "displacement": 0.02, "wobble": 0.04}
    return words | numbers | {"identity_kept": True, "watermark_seen": False} | {"position": list(position)} | changes


def test_rendered_truth_scores_full_marks():
    captions = held_out_captions()[::20]
    found = {
        domain: outcomes([[read(render_video(c, seed, domain)) for seed in (0, 1)] for c in captions], captions)
        for domain in ("clean", "video")
    }
    for domain, scores in found.items():
        assert list(scores) == list(METRICS)
        assert scores["all_right"].shape == (3, 2) and scores["all_right"].all(), domain
        assert scores["spread"].shape == (3, 1) and (scores["spread"] > 0).all()
        assert scores["identity_kept"].all() and np.nanmax(scores["wobble"]) < 0.15
    assert not found["clean"]["watermark_seen"].any() and found["video"]["watermark_seen"].all()
    assert found["clean"]["sharpness"].min() > found["video"]["sharpness"].max()


def test_all_right_needs_every_attribute():
    rows = [[reading(MOVING), reading(MOVING, colour="blue")], [reading(GROWING, motion=None), reading(GROWING)]]
    found = outcomes(rows, [MOVING, GROWING])
    np.testing.assert_array_equal(found["all_right"], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(found["colour"], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(found["motion"], [[1, 1], [0, 1]])


def test_identity_and_wobble_are_taken_as_they_were_read():
    rows = [[reading(MOVING, identity_kept=False, wobble=0.2), reading(MOVING, wobble=math.nan)]]
    found = outcomes(rows, [MOVING])
    np.testing.assert_array_equal(found["identity_kept"], [[0, 1]])
    np.testing.assert_array_equal(found["wobble"], [[0.2, math.nan]])


def test_only_moving_shapes_count_for_displacement():
    found = outcomes([[reading(MOVING)], [reading(GROWING)]], [MOVING, GROWING])
    np.testing.assert_array_equal(found["displacement"], [[0.02], [math.nan]])


def test_spread_is_the_deviation_of_positions_over_seeds():
    rows = [[reading(MOVING, (0.2, 0.5)), reading(MOVING, (0.8, 0.5)), reading(MOVING, (math.nan, math.nan))]]
    np.testing.assert_allclose(outcomes(rows, [MOVING])["spread"], [[0.3]])


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 0.5, (200, 1))
    estimate, low, high = interval(estimates(values, resampled_captions(200)))
    half = 1.96 * values.std() / math.sqrt(200)
    assert estimate == pytest.approx(values.mean())
    assert (estimate - low, high - estimate) == pytest.approx((half, half), rel=0.05)


def test_bootstrap_is_paired():
    values = np.random.default_rng(2).random((30, 4))
    rows = resampled_captions(30, resamples=100)
    difference = estimates(values + 0.1, rows) - estimates(values, rows)
    np.testing.assert_allclose(interval(difference), 0.1)


def test_bootstrap_passes_over_what_is_not_known():
    values = np.array([[1.0, math.nan], [3.0, 5.0], [math.nan, math.nan]])
    assert estimates(values, resampled_captions(3, resamples=5))[0] == pytest.approx(3.0)
    assert all(math.isnan(value) for value in interval(np.full(6, math.nan)))


def test_metrics_write_percent_digits_and_the_unknown():
    assert Metric("", percent=True).format(0.9125) == "91.2"
    assert Metric("", digits=3).format(0.9125) == "0.912"
    assert Metric("").format(math.nan) == "–"
