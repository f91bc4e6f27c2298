"""Animations that other tools wrote: each picture as many frames as it stands for, at the rate that was meant."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.evaluation.animations import Told, rate_of, repeats
from diffusers_mcm.evaluation.samples import open_samples, size_of
from diffusers_mcm.evaluation.videos import Window
from diffusers_mcm.video_io import write_video
from tests.evaluation.conftest import brightness, ramp

STILL_FIRST = [0] * 9 + list(range(1, 16))
TWICE = [t // 2 for t in range(16)]


def save(path, shown, duration):
    """An animation as Pillow writes it, and diffusers by it: of equal frames in a row one picture, which stays."""
    first, *others = [Image.fromarray(ramp()[t]) for t in shown]
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0, lossless=True)


def read(folder, count=16):
    """The brightness of the frames of each video of a folder, and its rate."""
    window = Window(count, 1, None, "start", 16, 16)
    return [(brightness(video.read(window, 0)), video.rate()) for video in open_samples(folder).videos]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_picture_that_stays_is_as_many_frames_as_it_stood_for(tmp_path, suffix):
    save(tmp_path / f"a-0.{suffix}", STILL_FIRST, 120)
    [(frames, rate)] = read(tmp_path, 24)
    np.testing.assert_allclose(frames, STILL_FIRST, atol=1)
    assert rate == pytest.approx(1000 / 120)


@pytest.mark.parametrize("duration", [120, 125])  # of which a GIF holds 12 hundredths, and of 16 together 200
def test_the_others_of_a_folder_tell_how_long_a_frame_of_a_still_clip_stays(tmp_path, duration):
    save(tmp_path / "a moving ring-0.gif", range(16), duration)
    save(tmp_path / "a ring-0.gif", [5] * 16, duration)
    (moving, _), (still, rate) = read(tmp_path)
    assert moving == list(range(16)) and still == [5] * 16
    assert rate == pytest.approx(1000 / duration)
    with pytest.raises(UnusableItem, match="it has 16 frames, fewer than the 17 asked for"):
        open_samples(tmp_path).videos[1].read(Window(17, 1, None, "start", 16, 16), 0)


def test_one_picture_alone_says_no_number_of_frames(tmp_path):
    save(tmp_path / "a-0.gif", [5] * 16, 125)
    save(tmp_path / "b-0.webp", [5] * 16, 125)
    videos = open_samples(tmp_path).videos
    for video, stays in zip(videos, (" that stays 2 s", "")):
        with pytest.raises(UnusableItem, match=f"it is one picture{stays}, and nothing says how many frames that is"):
            video.read(Window(4, 1, None, "start", 16, 16), 0)
        assert video.rate() is None
    assert size_of([open_samples(tmp_path)]) == (16, 16)


@pytest.mark.parametrize("told_by", ["table", "others"])
def test_frames_that_all_come_twice(tmp_path, told_by):
    save(tmp_path / "a-0.gif", TWICE, 120)
    assert read(tmp_path, 8) == [(list(range(8)), pytest.approx(1000 / 240))]
    if told_by == "table":
        (tmp_path / "metadata.csv").write_text("file_name,caption,fps\na-0.gif,a,8\n")
    else:
        for name in "bc":
            save(tmp_path / f"{name}-0.gif", range(16), 120)
    assert read(tmp_path)[0] == (TWICE, pytest.approx(8 if told_by == "table" else 1000 / 120))


def test_a_table_tells_how_many_frames_one_picture_is(tmp_path):
    save(tmp_path / "a.gif", [5] * 16, 125)
    (tmp_path / "metadata.csv").write_text("file_name,caption,fps\na.gif,a,8\n")
    assert read(tmp_path) == [([5] * 16, 8)]


def test_delays_that_alternate_are_one_rate(tmp_path):
    shown = [*range(10), 9, 9, 9, 9, *range(10, 20)]  # a picture of 5 frames among the others
    save(tmp_path / "a-0.gif", shown, [30, 30, 40] * 8)
    [(frames, rate)] = read(tmp_path, 24)
    assert frames == shown and rate == pytest.approx(30)


@pytest.mark.parametrize("rate", [8, 10, 12.5, 15, 16, 24, 25, 29.97, 30])
def test_any_rate_is_found_again_from_the_delays_of_this_package(tmp_path, rate):
    shown = [*range(5), *[4] * 6, *range(5, 12)]
    write_video(tmp_path / "a-0.gif", ramp()[shown], fps=rate)
    [(frames, found)] = read(tmp_path, len(shown))
    assert frames == shown and found == pytest.approx(rate, rel=0.02)


def test_a_rate_that_does_not_fit_how_long_pictures_stay_repeats_none(tmp_path):
    save(tmp_path / "a.gif", range(16), 100)  # a preview that plays slower
    (tmp_path / "metadata.csv").write_text("file_name,caption,fps\na.gif,a,24\n")
    assert read(tmp_path) == [(list(range(16)), 24)]


def test_one_odd_animation_changes_no_other(tmp_path):
    save(tmp_path / "a-0.gif", range(16), [120] * 15 + [10])
    for name in "bcd":
        save(tmp_path / f"{name}-0.gif", range(16), 120)
    assert all(each == (list(range(16)), pytest.approx(1000 / 120)) for each in read(tmp_path)[1:])


def test_pictures_without_times_are_a_frame_each(tmp_path):
    save(tmp_path / "a-0.gif", range(16), 0)
    assert read(tmp_path) == [(list(range(16)), None)]


def test_a_number_of_frames_that_is_known_is_met():
    """Of frames that come faster than a GIF can play them too."""
    path, durations = Path("a.gif"), [20.0, 20.0, 100.0, 20.0]
    assert sum(repeats(path, durations, Told(fps=60, num_frames=8))) == 8
    assert repeats(path, [0.0], Told(fps=8, num_frames=16)) == [16]
    assert repeats(path, durations, Told(num_frames=3)) == [1, 1, 5, 1]  # it is not of this file
    assert rate_of(path, durations, Told()) == 50


def test_what_decides_the_frames_is_in_the_stamp(tmp_path):
    save(tmp_path / "a.gif", TWICE, 120)
    stamps = []
    for fps in ("", "8"):
        (tmp_path / "metadata.csv").write_text(f"file_name,caption,fps\na.gif,a,{fps}\n")
        stamps.append(open_samples(tmp_path).videos[0].stamp)
    assert stamps[0] != stamps[1]


def test_deep_and_transparent_pictures(tmp_path):
    """16 bits are brought to 8, and what is transparent is white, as where images are read."""
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    clear = np.zeros((16, 16, 4), np.uint8)
    for number, frame in enumerate((deep, clear)):
        (tmp_path / f"{'ab'[number]}-0").mkdir()
        for t in range(4):
            Image.fromarray(frame).save(tmp_path / f"{'ab'[number]}-0" / f"{t}.png")
    frames = [each.read(Window(4, 1, None, "start", 16, 16), 0) for each in open_samples(tmp_path).videos]
    np.testing.assert_array_equal(frames[0][0, ..., 0], np.rint(deep / 257))
    assert (frames[1] == 255).all()


def test_transparent_animations_are_white(tmp_path):
    pictures = [Image.new("RGBA", (16, 16), (t, 0, 0, 0)) for t in range(4)]
    for t, picture in enumerate(pictures):
        picture.putpixel((t, 0), (9, 9, 9, 255))
    pictures[0].save(tmp_path / "a-0.webp", save_all=True, append_images=pictures[1:], duration=125, lossless=True)
    frames = open_samples(tmp_path).videos[0].read(Window(4, 1, None, "start", 16, 16), 0)
    assert frames[:, 8:].min() == 255
