"""Which frames make a clip, by the times at which they are shown."""

from fractions import Fraction

import av
import numpy as np
import pytest

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.timing import clip_positions, timed_clip_positions, times_in_output_order


@pytest.mark.parametrize("rounding", [None, 1000, 90000])  # exact times, Matroska's milliseconds, MPEG's clock
@pytest.mark.parametrize(("rate", "interval"), [(24, 1), (24, 3), (30, 2), (23.976, 1)])
def test_at_a_constant_rate_it_is_every_nth_frame(rate, interval, rounding):
    seconds = np.arange(100) / rate
    seconds = seconds if rounding is None else np.round(seconds * rounding) / rounding
    for uniform in np.linspace(0.003, 0.997, 40):
        expected = clip_positions(100, 8, interval, uniform)
        assert timed_clip_positions(seconds, 8, rate / interval, uniform) == expected


def test_a_frame_that_stays_is_taken_again_and_hurried_ones_are_passed_over():
    seconds = [0.0, 0.5, 1.0, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 4.0]
    assert timed_clip_positions(seconds, 9, 2, 0.0) == [0, 1, 2, 2, 2, 2, 3, 8, 9]


def test_at_the_rate_of_the_film_or_above_it_is_what_ffmpegs_fps_filter_gives():
    times = np.cumsum([0, 40, 40, 40, 200, 40, 40, 120, 40, 40, 40])
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=Fraction(1, 1000))
    rate, sink = graph.add("fps", "50"), graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    shown = []
    for number, time in enumerate([*times, None]):
        if time is not None:
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
        graph.push(None if time is None else frame)
        while True:
            try:
                shown.append(int(graph.pull().to_ndarray()[0, 0]))
            except (av.error.BlockingIOError, av.error.EOFError):
                break
    count = int(times[-1] * 50 / 1000) + 1
    positions = timed_clip_positions(times / 1000, 11, 50, 0.0)
    assert positions == shown[:11] and count >= 11


def test_a_short_film_is_spread_over_the_clip_and_one_too_short_refused():
    assert timed_clip_positions([0, 1, 2, 3, 4], 5, 0.1, 0.9) == [0, 1, 2, 3, 4]
    with pytest.raises(UnusableItem, match="it has 5 frames, fewer than the 6 asked for"):
        timed_clip_positions([0, 1, 2, 3, 4], 6, 1, 0.0)


def test_one_frame_is_drawn_by_how_long_it_is_shown():
    drawn = [timed_clip_positions([0, 1, 2, 10, 11], 1, 8, (k + 0.5) / 600)[0] for k in range(600)]
    assert np.bincount(drawn).tolist() == [50, 50, 400, 50, 50]


def test_labels_in_the_order_of_decoding_are_put_in_order_and_useless_ones_replaced():
    base, rate = Fraction(1, 48), Fraction(24)
    assert times_in_output_order([2, 4, 8, 10, 6], base, rate) == [2, 4, 6, 8, 10]
    assert times_in_output_order([None, 4, 8], base, rate) == [0, 2, 4]
    started_again = [*range(0, 60, 2), *range(1, 61, 2)]
    assert times_in_output_order(started_again, base, rate) == list(range(0, 120, 2))
