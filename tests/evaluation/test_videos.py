"""References and folders of samples: which videos, which captions, which frames."""

import json
from pathlib import Path

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
    write_video(tmp_path / "a blue ring-0.mp4", ramp(8))
    for index in range(2):
        write_video(tmp_path / f"a red-hot ring-{index}.mp4", ramp(8))
    found = [(video.caption, video.seed) for video in open_samples(tmp_path).videos]
    assert found == [("a blue ring", 0), ("a red-hot ring", 0), ("a red-hot ring", 1)]


@pytest.mark.parametrize("name", ["a-0.mp4", "a-0.gif", "a-0.webp", "a-0"])
def test_every_format_that_holds_frames(tmp_path, name):
    write_video(tmp_path / name, ramp(8))
    (video,) = open_samples(tmp_path).videos
    frames = video.read(Window(4, 1, None, "start", 16, 16), 0)
    assert frames.shape == (4, 16, 16, 3) and brightness(frames) == [0, 1, 2, 3]
    assert size_of([open_samples(tmp_path)]) == (16, 16)


@pytest.mark.parametrize("name", ["a-0.webp", "a-0"])
def test_too_few_pictures(tmp_path, name):
    write_video(tmp_path / name, ramp(3))
    with pytest.raises(UnusableItem, match="it has 3 frames, fewer than the 4 asked for"):
        open_samples(tmp_path).videos[0].read(WINDOW, 0)


def test_names_that_only_count_are_no_captions(tmp_path):
    for index in range(3):
        write_video(tmp_path / f"sample-{index:04d}.mp4", ramp(8))
    with pytest.raises(
        ValueError, match="all 3 videos of .* would show 'sample', by their names: write a metadata.csv"
    ):
        open_samples(tmp_path)


def test_frames_are_read_by_the_numbers_in_their_names(tmp_path):
    (tmp_path / "a-0").mkdir()
    for t in range(12):
        Image.fromarray(ramp()[t]).save(tmp_path / "a-0" / f"{t}.png")
    frames = open_samples(tmp_path).videos[0].read(Window(12, 1, None, "start", 16, 16), 0)
    assert brightness(frames) == list(range(12))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("shown", [[5] * 8, [0, 0, 0, 9, 9, 20, 20, 20]], ids=["still", "in part"])
def test_animations_whose_writer_joins_equal_frames(tmp_path, suffix, shown):
    path = tmp_path / f"clip{suffix}"
    write_video(path, ramp()[shown], fps=8, metadata={"prompt": "p", "seed": 0, "num_frames": 8, "fps": 8})
    frames = open_samples(tmp_path).videos[0].read(Window(8, 1, None, "start", 16, 16), 0)
    np.testing.assert_allclose(brightness(frames), shown, atol=1)


def test_a_table_beside_animations(tmp_path):
    write_video(tmp_path / "a.webp", ramp(8))
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.webp,one\n")
    (video,) = open_samples(tmp_path).videos
    assert video.caption == "one" and len(video.read(WINDOW, 0)) == 4


def test_what_cannot_be_opened_is_skipped_where_others_say_their_prompts(tmp_path):
    folder = Path(write_samples(tmp_path / "mcm4"))
    (folder / "0002-clip.mp4").write_bytes((folder / "0002-clip.mp4").read_bytes()[:700])
    (folder / "0003-clip.mp4").write_bytes(b"")
    (folder / "._0001-clip.mp4").write_bytes(b"what macOS leaves")
    found = open_samples(folder)
    assert [video.caption for video in found.videos] == [CAPTIONS[0], *CAPTIONS[3:]]
    assert {Path(name).name for name in found.skipped} == {"0002-clip.mp4", "0003-clip.mp4"}
    assert all("cannot be read" in reason for reason in found.skipped.values())


def test_a_video_without_a_prompt_among_others_that_have_one(tmp_path):
    write_samples(tmp_path / "mcm4")
    write_video(tmp_path / "mcm4" / "other.mp4", ramp(8))
    with pytest.raises(ValueError, match="other.mp4 does not say what it shows, as others of .* do"):
        open_samples(tmp_path / "mcm4")


@pytest.mark.parametrize("name", ["a-0.webp", "a-0"])
def test_a_broken_picture_is_the_videos_fault(tmp_path, name):
    write_video(tmp_path / name, ramp(8))
    broken = tmp_path / name / "0003.png" if name == "a-0" else tmp_path / name
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UnusableItem, match="the video cannot be read"):
        open_samples(tmp_path).videos[0].read(WINDOW, 0)


def test_samples_of_several_sizes(tmp_path):
    write_samples(tmp_path / "a")
    write_video(tmp_path / "b" / "a-0.mp4", ramp(8))
    with pytest.raises(ValueError, match=r"samples of one size, got 64×64 in .*a, 16×16 in .*b: say with --size"):
        size_of([open_samples(tmp_path / "a"), open_samples(tmp_path / "b")])


def test_captions_are_the_same_however_unicode_writes_them(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(8), metadata={"prompt": "cafe\u0301"})
    assert open_samples(tmp_path).videos[0].caption == "caf\u00e9"


def test_a_film_that_is_too_short_for_its_rate_is_never_read_faster(ramps):
    video = open_reference(str(ramps), None, 0).videos[1]  # 12 frames at 8 per second
    with pytest.raises(UnusableItem, match="it lasts 1.5 s, too short for 4 frames at 1 per second"):
        video.read(Window(4, 1, 1.0, "start", 16, 16), 0)


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
    with pytest.raises(ValueError, match="none of the 1 videos of .* can be opened"):
        size_of([open_samples(tmp_path)])


def test_a_set_is_described_by_its_videos_wherever_they_lie(tmp_path, world):
    import shutil

    shutil.copytree(world, tmp_path / "moved")
    here, there = (open_reference(str(folder), None, 0).described() for folder in (world, tmp_path / "moved"))
    assert here["sha256"] == there["sha256"] and here["num_videos"] == 6
    assert open_reference(str(world), 3, 0).described()["sha256"] != here["sha256"]
