"""Which videos of two methods are compared, and what their differences are."""

import logging

import numpy as np
import pytest

from diffusers_mcm.evaluation.measuring import Measured
from diffusers_mcm.evaluation.metrics import mean_score
from diffusers_mcm.evaluation.pairing import check_alike, common, differences_of, warn_of_other_captions
from diffusers_mcm.evaluation.videos import Video, VideoSet


def videos(*captions, seeds=None):
    pairs = zip(captions, seeds or range(len(captions)))
    return [Video(f"{caption}-{seed}.mp4", caption, seed, None, None) for caption, seed in pairs]


def named(name, *captions, skipped=()):
    return VideoSet(name, f"out/{name}", videos(*captions), dict.fromkeys(skipped, "broken"))


def measured(found, values, skipped=()):
    return Measured(found, dict.fromkeys(skipped, "broken"), {"clipsim": np.array(values, dtype=float)})


def test_the_same_captions_in_any_order_are_alike():
    check_alike([named("a", "x", "y", "x"), named("b", "x", "x", "y")])


@pytest.mark.parametrize(
    "other, message",
    [
        (named("b", "x"), "as many videos in every folder, got 2 in out/a and 1 in out/b"),
        (named("b", "x", "z"), "out/b does not show 'y', as out/a does"),
        (named("b", "x", "x"), "out/b does not show 'y', as out/a does"),
    ],
)
def test_folders_that_are_not_alike(other, message):
    with pytest.raises(ValueError, match=message):
        check_alike([named("a", "x", "y"), other])


def test_what_cannot_be_opened_is_no_other_caption():
    check_alike([named("a", "x", "y"), named("b", "x", skipped=["broken.mp4"])])


def test_methods_are_compared_on_the_videos_that_all_have():
    """By caption and seed; what one method lacks counts for none."""
    a = measured(videos("x", "y", "x", "z", seeds=(1, 0, 0, 0)), [11, 20, 10, 30])
    b = measured(videos("x", "x", "z", seeds=(0, 1, 0)), [1, 2, 3], skipped=["y"])
    shared, left_out = common({"a": a, "b": b})
    assert left_out == 1
    assert shared["a"].values["clipsim"].tolist() == [10, 11, 30]
    assert shared["b"].values["clipsim"].tolist() == [1, 2, 3]
    assert [video.caption for video in shared["a"].videos] == ["x", "x", "z"]


def test_a_seed_that_cannot_be_read_moves_no_other():
    a = measured(videos(*"xxxx", seeds=(0, 1, 2, 3)), [0, 1, 2, 3])
    b = measured(videos(*"xxx", seeds=(0, 2, 3)), [0, 2, 3], skipped=["x-1.mp4"])
    shared, left_out = common({"a": a, "b": b})
    assert left_out == 1
    assert shared["a"].values["clipsim"].tolist() == shared["b"].values["clipsim"].tolist() == [0, 2, 3]
    neither = measured(videos(*"xxx", seeds=(0, 1, 3)), [0, 1, 3], skipped=["x-2.mp4"])
    shared, left_out = common({"b": b, "neither": neither})
    assert (left_out, shared["b"].values["clipsim"].tolist()) == (2, [0, 3])


@pytest.mark.parametrize("seeds", [(7, 8, 9), (None, None, None)], ids=["others", "unknown"])
def test_methods_of_other_seeds_are_compared_in_their_order(seeds):
    a = measured(videos("x", "x", "y", seeds=(1, 0, 0)), [11, 10, 20])
    b = measured(videos("x", "x", "y", seeds=seeds), [1, 2, 3])
    shared, left_out = common({"a": a, "b": b})
    assert left_out == 0
    assert shared["a"].values["clipsim"].tolist() == [10, 11, 20]
    assert shared["b"].values["clipsim"].tolist() == [1, 2, 3]


def test_videos_of_unknown_seeds_are_in_the_order_of_their_numbers():
    """`x-2` comes before `x-10`, whatever the other method calls its own."""
    a, b = (
        measured([Video(name, "x", None, None, None) for name in names], values)
        for names, values in ((["x-10.mp4", "x-2.mp4"], [2, 1]), (["0001.mp4", "0002.mp4"], [1, 2]))
    )
    shared, _ = common({"a": a, "b": b})
    assert shared["a"].values["clipsim"].tolist() == shared["b"].values["clipsim"].tolist() == [1, 2]


def test_a_caption_with_one_seed_twice_is_no_loss():
    a, b = (measured(videos("x", "x", "y", seeds=(0, 0, 0)), [1, 2, 3]) for _ in range(2))
    shared, left_out = common({"a": a, "b": b})
    assert left_out == 0 and shared["a"].values["clipsim"].tolist() == [1, 2, 3]


def test_differences_are_of_pairs_over_captions():
    found = videos(*(f"caption {number // 2}" for number in range(40)))
    noise = np.random.default_rng(0).normal(size=40)
    results = {"a": measured(found, noise), "b": measured(found, noise + 1)}
    scores = {name: {"clipsim": mean_score(each.values["clipsim"])} for name, each in results.items()}
    values = {name: {"clipsim": each.values["clipsim"].mean()} for name, each in results.items()}
    (difference,) = differences_of(results, scores, values, resamples=50, seed=0)
    assert (difference.method, difference.less, difference.column) == ("b", "a", "clipsim")
    # the noise is common to both
    assert difference.interval.estimate == pytest.approx(1)
    assert difference.interval.high - difference.interval.low < 1e-9


@pytest.mark.parametrize("resamples, captions", [(0, ("x", "y")), (50, ("x", "x"))])
def test_there_are_no_intervals_without_captions_to_draw(resamples, captions):
    results = {name: measured(videos(*captions), [1, 2]) for name in "ab"}
    scores = {name: {"clipsim": mean_score(each.values["clipsim"])} for name, each in results.items()}
    assert differences_of(results, scores, {}, resamples, seed=0) == []


def test_captions_that_are_not_the_references_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_other_captions(named("a", "x", "y"), named("real", "y", "x"))
        assert caplog.text == ""
        warn_of_other_captions(named("a", "x", "q"), named("real", "x", "y", "z"))
    assert (
        "out/a holds 2 videos, of which 1 captions are not the reference's, and the reference 3 videos" in caplog.text
    )
