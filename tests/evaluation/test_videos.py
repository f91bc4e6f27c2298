"""References: which videos, which captions, which frames; seeds and rates in words."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.data.columns import IMAGES
from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.evaluation.videos import Video, Window, open_reference, seeds_of
from tests.evaluation.conftest import CAPTIONS, brightness

WINDOW = Window(4, 1, None, "start", 64, 64)


def test_every_row_of_a_reference_comes_once_in_its_order(world):
    videos = open_reference(str(world), None, 0).videos
    assert [video.caption for video in videos] == CAPTIONS


def test_a_seed_chooses_some_rows(world):
    few = [video.name for video in open_reference(str(world), 3, 0).videos]
    assert len(set(few)) == 3
    assert few == [video.name for video in open_reference(str(world), 3, 0).videos]
    assert few != [video.name for video in open_reference(str(world), 3, 1).videos]


def test_more_videos_than_there_are(world):
    with pytest.raises(ValueError, match="holds 6 videos that can be used, fewer than 7"):
        open_reference(str(world), 7, 0)


def test_of_several_captions_the_seed_chooses_one(ramps):
    lines = [json.dumps({"file_name": "0.mp4", "caption": ["one", "two", "three"]})]
    (ramps / "metadata.csv").unlink()
    (ramps / "metadata.jsonl").write_text("\n".join(lines))
    found = {open_reference(str(ramps), None, seed).videos[0].caption for seed in range(12)}
    assert found == {"one", "two", "three"}
    assert (
        open_reference(str(ramps), None, 4).videos[0].caption == open_reference(str(ramps), None, 4).videos[0].caption
    )


@pytest.mark.parametrize(
    "window, frames",
    [
        (Window(4, 3, None, "start", 16, 16), [0, 3, 6, 9]),
        (Window(4, 3, None, "centre", 16, 16), [15, 18, 21, 24]),
        (Window(4, 1, None, "start", 16, 16), [0, 1, 2, 3]),
        (Window(3, 1, 2.0, "start", 16, 16), [0, 4, 8]),
    ],
)
def test_windows(ramps, window, frames):
    video = open_reference(str(ramps), None, 0).videos[0]
    assert brightness(video.read(window, window.start(0, 0))) == frames


def test_a_random_window_is_keyed_by_seed_and_number(ramps):
    window = Window(4, 1, None, "random", 16, 16)
    starts = [window.start(0, number) for number in range(50)]
    assert min(starts) < 0.1 and max(starts) > 0.9
    assert starts == [window.start(0, number) for number in range(50)] != [window.start(1, n) for n in range(50)]


def test_a_short_video_is_never_read_at_another_interval(ramps):
    video = open_reference(str(ramps), None, 0).videos[1]
    with pytest.raises(UnusableItem, match="it has 12 frames, fewer than the 13 asked for"):
        video.read(Window(4, 4, None, "start", 16, 16), 0)


@pytest.fixture
def captioned(tmp_path):
    """Four files of twenty captions each, a row for each caption."""
    lines = [f"{name}.mp4,{name} text {number}" for name in "abcd" for number in range(20)]
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    return str(tmp_path)


def test_of_a_row_for_each_caption_every_file_is_taken_once(captioned, caplog):
    chosen = [open_reference(captioned, 4, seed) for seed in range(8)]
    assert all(len({video.name for video in each.videos}) == 4 for each in chosen)
    assert len({video.caption for each in chosen for video in each.videos}) > 8
    assert not caplog.text and not any(each.remarks for each in chosen)


@pytest.mark.parametrize("number", [None, 40])
def test_files_that_count_several_times_are_told(captioned, number, caplog):
    found = open_reference(captioned, number, 0)
    assert len(found.videos) == len({video.caption for video in found.videos}) == (number or 80)
    told = f"The {number or 80} videos of (reference) are 4 files, of which some count several times"
    assert told in caplog.text and "--num_videos 4 takes each once" in found.remarks[0]


def test_images_that_count_several_times_are_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,one\na.png,two\n")
    (told,) = open_reference(str(tmp_path), None, 0, IMAGES, "(images)").remarks
    assert "The 2 images of (images) are 1 files" in told and "--num_images 1 takes each once" in told


def test_rows_with_files_of_their_own_are_drawn_as_ever(world):
    order = np.random.default_rng([5, 0]).permutation(6)[:4]
    assert [video.caption for video in open_reference(str(world), 4, 5).videos] == [CAPTIONS[n] for n in order]


def test_what_is_missing_is_named(ramps):
    found = open_reference(str(ramps), None, 0)
    assert len(found.videos) == 2 and list(found.skipped) == [str(ramps / "2.mp4")]


def test_images_are_one_frame_each(tmp_path):
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "a.png")
    images = open_reference(str(tmp_path), None, 0, IMAGES)
    assert images.videos[0].read(WINDOW._replace(height=8, width=8), 0).shape == (1, 8, 8, 3)


def test_seeds_in_words():
    def told(*seeds, caption="x"):
        return seeds_of([Video("", caption, seed, None, None) for seed in seeds])

    assert (told(0), told(0, 0), told(3, 1), told(0, 1, 2), told(1, None)) == ("0", "0", "1 and 3", "0 to 2", None)
    many = told(5, 70, 900, 31, 8)
    assert re.fullmatch("5 of SHA-256 [0-9a-f]{16}", many) and many != told(5, 70, 900, 31, 9)
    assert many != told(5, 70, 900, 31, 8, caption="y")


def test_a_film_that_is_too_short_for_its_rate_is_never_read_faster(ramps):
    video = open_reference(str(ramps), None, 0).videos[1]  # 12 frames at 8 per second
    with pytest.raises(UnusableItem, match="it lasts 1.5 s, too short for 4 frames at 1 per second"):
        video.read(Window(4, 1, 1.0, "start", 16, 16), 0)


def test_a_set_is_described_by_its_videos_wherever_they_lie(tmp_path, world):
    import shutil

    shutil.copytree(world, tmp_path / "moved")
    here, there = (open_reference(str(folder), None, 0).described() for folder in (world, tmp_path / "moved"))
    assert here["sha256"] == there["sha256"] and here["num_videos"] == 6
    assert open_reference(str(world), 3, 0).described()["sha256"] != here["sha256"]
