"""Motion of videos that are drawn so that the answer is known."""

import numpy as np
import pytest

from diffusers_mcm.evaluation.motion import MEASURES, motion_of


def clip(values):
    """Frames (T, 8, 8, 3) of one brightness each."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 8, 8, 3))


def test_a_still_video():
    assert motion_of(clip([100, 100, 100])).tolist() == [0, 1, 0]


def test_a_steady_change_has_no_flicker():
    assert motion_of(clip([10, 20, 30, 40])).tolist() == [10, 0, 0]


def test_an_alternating_brightness_is_all_flicker():
    assert motion_of(clip([10, 20, 10, 20, 10])).tolist() == [10, 0, 10]


def test_what_is_taken_back_in_part_counts_in_part():
    assert motion_of(clip([10, 30, 25])).tolist() == [12.5, 0, 5]


def test_an_edge_that_moves_on_does_not_flicker():
    frames = np.zeros((6, 8, 8, 3), np.uint8)
    for t in range(6):
        frames[t, :, : t + 1] = 255
    change, still, flicker = motion_of(frames)
    assert (change, still, flicker) == (255 / 8, 0, 0)


def test_they_are_named():
    assert len(MEASURES) == len(motion_of(clip([1, 2, 3]))) and list(MEASURES)[0] == "change"


def test_too_few_frames():
    with pytest.raises(ValueError, match=r"at least 3 frames \(T, H, W, 3\), got \(2, 8, 8, 3\)"):
        motion_of(clip([1, 2]))
