"""Which frames make a clip, by the times at which they are shown."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.timing import clip_positions, timed_clip_positions, times_in_output_order
from diffusers_mcm.data.video import open_film, read_clip, read_index

from .conftest import flat_frames, frame_numbers


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
    assert times_in_output_order([None, None, None], base, rate) == [0, 2, 4]
    assert times_in_output_order([None, 7, None], base, rate) == [0, 2, 4]  # one says too little
    started_again = [*range(0, 60, 2), *range(1, 61, 2)]
    assert times_in_output_order(started_again, base, rate) == list(range(0, 120, 2))


TIMES = [0, 40, 80, 200, 240, 280, 400, 440, 480, 520]  # of an uneven film
BASE, RATE = Fraction(1, 1000), Fraction(25)


@pytest.mark.parametrize("missing", [(0,), (4,), (9,), (0, 9), (1, 2), (4, 5, 7)])
def test_a_missing_time_is_put_between_its_neighbours_and_the_others_stay(missing):
    given = [None if place in missing else time for place, time in enumerate(TIMES)]
    times = times_in_output_order(given, BASE, RATE)
    assert [times[place] for place in range(10) if place not in missing] == [t for t in given if t is not None]
    assert (np.diff([float(time) for time in times]) > 0).all() and len(times) == 10
    if missing == (4,):
        assert times[4] == 240
    if missing == (9,):
        assert times[9] == 520


def test_a_label_that_comes_twice_or_is_far_off_harms_no_other():
    even = list(range(0, 4000, 40))
    for place, wrong in ((50, even[49]), (50, 10**9), (50, -(10**9)), (3, 3600)):
        given = [*even[:place], wrong, *even[place + 1 :]]
        assert times_in_output_order(given, BASE, RATE) == even


def test_a_missing_label_among_those_in_the_order_of_decoding():
    """In groups of four the last comes first, as AVI labels frames."""
    labels = [time for start in range(0, 80, 4) for time in (start + 3, start, start + 1, start + 2)]
    assert times_in_output_order(labels, BASE, RATE) == list(range(80))
    labels[42] = None
    times = [float(time) for time in times_in_output_order(labels, BASE, RATE)]
    assert np.abs(np.array(times) - np.arange(80)).max() <= 1 and (np.diff(times) > 0).all()


def film(times, last, container="mp4"):
    """Frame k of `flat_frames` is shown at times[k] / 1000 s, the last one for `last` / 1000 s."""
    buffer, durations = io.BytesIO(), [*np.diff(times).tolist(), last]
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "4", "bf": "0", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 32, 24, "yuv420p", BASE
        for number, pixels in enumerate([*flat_frames(len(times)), None]):
            frame = None
            if pixels is not None:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = times[number], BASE
            for packet in stream.encode(frame):
                packet.duration = durations[times.index(round(packet.pts * packet.time_base * 1000))]
                output.mux(packet)
    return {"path": None, "bytes": buffer.getvalue()}


def shown(media, num_frames, fps, uniform):
    frames = read_clip(media, num_frames, 1, 24, 32, uniform, fps=fps)
    return frame_numbers(torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1)


@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_a_film_of_known_times_is_read_by_them(container):
    media = film(TIMES, 400, container)
    with open_film(media) as opened:
        index = read_index(opened)
    assert [round(time * index.time_base * 1000) for time in index.times] == TIMES
    assert round(index.end * index.time_base * 1000) == 920
    moments = np.arange(7) * 125 + 20  # within half of 40 ms
    assert shown(media, 7, 8, 0.0) == [sum(time <= moment for time in TIMES) - 1 for moment in moments]
    assert shown(media, 7, 8, 0.0)[-2:] == [9, 9]  # the last one stays, and the film is no shorter for it


def test_the_last_frame_is_drawn_by_how_long_it_is_shown():
    drawn = [timed_clip_positions([0, 1, 2, 3], 1, 8, (k + 0.5) / 600, 6) for k in range(600)]
    assert np.bincount(np.ravel(drawn)).tolist() == [100, 100, 100, 300]
    usual = [timed_clip_positions([0, 1, 2, 3], 1, 8, (k + 0.5) / 600) for k in range(600)]
    assert np.bincount(np.ravel(usual)).tolist() == [150] * 4


def test_a_last_frame_of_hours_is_a_mistake_of_the_writer():
    drawn = [timed_clip_positions([0, 1, 2, 3], 1, 8, (k + 0.5) / 600, 1e5) for k in range(600)]
    assert np.bincount(np.ravel(drawn)).tolist() == [100, 100, 100, 300]
    assert timed_clip_positions([0, 1, 2, 3], 4, 1, 0.0, 0.5) == [0, 1, 2, 3]  # and so is one that ends before


def test_a_film_that_ends_while_its_last_frame_is_shown_keeps_the_clips_speed():
    """57 frames at 30 per second last 1.9 s; of 16 frames at 7.97 per second the last is shown from 1.882 s on."""
    seconds = np.arange(57) / 30
    expected = [min(int((k / 7.97 + 1 / 60) * 30), 56) for k in range(16)]
    for uniform in (0.0, 0.5, 0.999):
        assert timed_clip_positions(seconds, 16, 7.97, uniform) == expected


@pytest.mark.parametrize("length", range(16, 70))
def test_clips_of_films_about_as_long_as_they_are_ascend_and_stay_within(length):
    seconds = np.arange(length) / 30
    for uniform in np.linspace(0, 0.999, 7):
        positions = timed_clip_positions(seconds, 16, 8, uniform)
        assert len(positions) == 16 and 0 <= positions[0] and positions[-1] <= length - 1
        assert (np.diff(positions) >= 1).all()  # the film has a frame for each of the clip's
        if length <= 56:
            assert positions[0] == 0 and positions[-1] == length - 1  # spread over all of it
