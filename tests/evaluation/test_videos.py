"""References and folders of samples: which videos, which captions, which frames."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.data.columns import IMAGES
from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.evaluation.videos import Window, open_reference, open_samples, size_of
from diffusers_mcm.video_io import write_video
from tests.evaluation.conftest import CAPTIONS, write_samples

WINDOW = Window(4, 1, None, "start", 64, 64)


def ramp(count=40):
    """Frame t has brightness 4 t."""
    return np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, 16, 16, 3))


@pytest.fixture
def ramps(tmp_path):
    for number, length in enumerate((40, 12)):
        write_video(tmp_path / f"{number}.mp4", ramp(length))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.mp4,long\n1.mp4,short\n2.mp4,gone\n")
    return tmp_path


def brightness(frames):
    return np.rint(frames.mean((1, 2, 3)) / 4).tolist()


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


def test_what_is_missing_is_named(ramps):
    found = open_reference(str(ramps), None, 0)
    assert len(found.videos) == 2 and list(found.skipped) == [str(ramps / "2.mp4")]


def test_images_are_one_frame_each(tmp_path):
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / "a.png")
    images = open_reference(str(tmp_path), None, 0, IMAGES)
    assert images.videos[0].read(WINDOW._replace(height=8, width=8), 0).shape == (1, 8, 8, 3)


def test_own_samples_say_prompt_seed_and_settings(tmp_path):
    found = open_samples(write_samples(tmp_path / "mcm4"))
    assert found.name == "mcm4"
    assert [(video.caption, video.seed) for video in found.videos] == list(zip(CAPTIONS, range(6)))
    assert found.settings == {"num_inference_steps": 4, "model": "mcm-shapes"}


def test_only_what_all_samples_say_alike_is_a_setting(tmp_path):
    write_samples(tmp_path / "all", 4)
    write_video(tmp_path / "all" / "last.mp4", ramp(8), metadata={"prompt": "p", "num_inference_steps": 8})
    assert open_samples(tmp_path / "all").settings == {}


def test_a_table_beside_the_files_says_the_prompts(ramps):
    found = open_samples(ramps, "theirs")
    assert [video.caption for video in found.videos] == ["long", "short"] and found.name == "theirs"
    assert len(found.skipped) == 1


def test_vbench_names(tmp_path):
    for index in range(2):
        write_video(tmp_path / f"a red-hot ring-{index}.mp4", ramp(8))
    assert [(v.caption, v.seed) for v in open_samples(tmp_path).videos] == [
        ("a red-hot ring", 0),
        ("a red-hot ring", 1),
    ]


@pytest.mark.parametrize("name", ["a-0.mp4", "a-0.gif", "a-0.webp", "a-0"])
def test_every_format_that_holds_frames(tmp_path, name):
    write_video(tmp_path / name, ramp(8))
    (video,) = open_samples(tmp_path).videos
    frames = video.read(Window(4, 1, None, "start", 16, 16), 0)
    assert frames.shape == (4, 16, 16, 3) and brightness(frames) == [0, 1, 2, 3]
    assert size_of([video]) == (16, 16)


@pytest.mark.parametrize("name", ["a-0.webp", "a-0"])
def test_too_few_pictures(tmp_path, name):
    write_video(tmp_path / name, ramp(3))
    with pytest.raises(UnusableItem, match="it has 3 frames, fewer than the 4 asked for"):
        open_samples(tmp_path).videos[0].read(WINDOW, 0)


def test_a_video_that_does_not_say_what_it_shows(tmp_path):
    write_video(tmp_path / "clip.mp4", ramp(8))
    with pytest.raises(ValueError, match=r"clip.mp4 does not say what it shows: .* metadata.csv with file_name"):
        open_samples(tmp_path)


def test_folders_without_videos(tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        open_samples(tmp_path)
    with pytest.raises(ValueError, match="which is not there"):
        open_samples(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file"):
        open_samples(tmp_path / "file")


def test_the_size_of_what_cannot_be_read(tmp_path):
    (tmp_path / "a-0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="none of the 1 videos can be read"):
        size_of(open_samples(tmp_path).videos)


def test_a_set_is_described_by_its_videos_wherever_they_lie(tmp_path, world):
    import shutil

    shutil.copytree(world, tmp_path / "moved")
    here, there = (open_reference(str(folder), None, 0).described() for folder in (world, tmp_path / "moved"))
    assert here["sha256"] == there["sha256"] and here["num_videos"] == 6
    assert open_reference(str(world), 3, 0).described()["sha256"] != here["sha256"]


def test_captions_are_compared_in_any_order(tmp_path):
    a = open_samples(write_samples(tmp_path / "a"))
    b = open_samples(write_samples(tmp_path / "b", captions=CAPTIONS[::-1]))
    c = open_samples(write_samples(tmp_path / "c", captions=[*CAPTIONS[:5], CAPTIONS[0]]))
    assert a.captions_digest() == b.captions_digest() != c.captions_digest()
