from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mcm.video_io import (
    check_fps,
    comparison,
    contact_sheet,
    exact_rate,
    read_metadata,
    to_uint8,
    write_frames,
    write_image,
    write_video,
)


@pytest.fixture
def video():
    """A gradient that moves: uint8 (6, 32, 48, 3)."""
    t, y, x = np.meshgrid(np.arange(6), np.arange(32), np.arange(48), indexing="ij")
    return np.stack([x * 4 + t * 8, y * 6, 128 + 0 * x], axis=-1).astype(np.uint8)


def test_mp4_holds_the_frames_and_their_rate(tmp_path, video):
    write_video(tmp_path / "new" / "v.mp4", video, fps=12)
    with av.open(str(tmp_path / "new" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 12)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == video.shape
    assert np.abs(frames.astype(int) - video).mean() < 4


def test_same_frames_give_the_same_bytes(tmp_path, video):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, video)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_mp4_pads_odd_sizes_to_even(tmp_path, video):
    write_video(tmp_path / "v.mp4", video[:, :31, :47])
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (32, 48)


def test_gif_holds_the_frames_and_their_rate(tmp_path, video):
    write_video(tmp_path / "v.gif", video, fps=8)
    with Image.open(tmp_path / "v.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (6, (48, 32), 120)


def timing(path):
    """How long each frame of an animation stays, in milliseconds."""
    with Image.open(path) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
        return durations


@pytest.mark.parametrize("fps", [0.7, 7, 8, 12, 15, 23.976, 24, 30, 33, 48, 50])
@pytest.mark.parametrize(("name", "unit"), [("v.gif", 10), ("v.webp", 1)])
def test_an_animation_lasts_as_long_as_it_should(tmp_path, video, fps, name, unit):
    frames = np.concatenate([video] * 4)
    write_video(tmp_path / name, frames, fps=fps)
    found = timing(tmp_path / name)
    assert len(found) == 24 and max(found) - min(found) <= unit
    assert abs(sum(found) - 24_000 / fps) <= unit / 2 + 1e-6
    ends = np.cumsum(found) - np.arange(1, 25) * 1000 / fps
    assert np.abs(ends).max() <= unit / 2 + 1e-6  # and never drifts in between


@pytest.mark.parametrize("fps", [51, 60, 120.0])
def test_a_gif_that_would_be_too_fast_is_slower_and_says_so(tmp_path, video, fps):
    with pytest.warns(UserWarning, match=f"a GIF plays 50 frames per second at most: asked for {fps:g}, it lasts"):
        write_video(tmp_path / "v.gif", video, fps=fps)
    assert timing(tmp_path / "v.gif") == [20] * 6


@pytest.mark.filterwarnings("error")
def test_what_is_slow_enough_warns_of_nothing(tmp_path, video):
    write_video(tmp_path / "v.gif", video, fps=50)
    write_video(tmp_path / "v.webp", video, fps=60)
    assert sum(timing(tmp_path / "v.webp")) == 100


@pytest.mark.parametrize("name", ["v.gif", "v.webp"])
def test_frames_that_stay_the_same_take_their_time(tmp_path, video, name):
    still = np.concatenate([video[:2], video[[2] * 7], video[3:]])  # 12 frames, 7 of them alike
    write_video(tmp_path / name, still, fps=24)
    assert sum(timing(tmp_path / name)) == 500


def test_a_gif_that_never_moves_takes_its_time(tmp_path, video):
    write_video(tmp_path / "v.gif", video[[0] * 12], fps=24)
    assert sum(timing(tmp_path / "v.gif")) == 500


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (12.5, Fraction(25, 2)), (0.3, Fraction(3, 10))],
)
def test_an_mp4_has_the_rate_that_is_meant(tmp_path, video, fps, rate):
    assert exact_rate(fps) == rate
    write_video(tmp_path / "v.mp4", video, fps=fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        seconds = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    np.testing.assert_allclose(np.diff(seconds), float(1 / rate), rtol=1e-3)  # the container counts in ticks


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), None, "8", True])
@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "v.png", "v"])
def test_rates_that_are_none_are_refused(tmp_path, video, fps, name):
    with pytest.raises(ValueError, match="expected fps above 0, got"):
        write_video(tmp_path / name, video, fps=fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0.001, 2000])
def test_rates_that_no_player_has_are_refused(fps):
    with pytest.raises(ValueError, match="expected fps from 0.01 to 1000, got"):
        check_fps(fps)


def test_a_folder_may_have_a_dot_in_its_name(tmp_path, video):
    for _ in range(2):  # by its slash, then because it is there
        write_video(f"{tmp_path}/run_0.5/", video)
    write_video(tmp_path / "run_0.5", video[:3])
    assert [path.name for path in sorted((tmp_path / "run_0.5").iterdir())] == ["0001.png", "0002.png", "0003.png"]
    with pytest.raises(ValueError, match=r"a folder is written with a slash at its end: 'run_0.7/'"):
        write_video("run_0.7", video)


def test_webp_holds_the_frames_and_their_rate(tmp_path, video):
    write_video(tmp_path / "v.webp", video, fps=8)
    with Image.open(tmp_path / "v.webp") as image:
        assert (image.n_frames, image.size) == (6, (48, 32))
        for index, frame in enumerate(video):
            image.seek(index)
            image.load()
            assert image.info["duration"] == 125
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).mean() < 4


def test_frames_are_a_folder_of_exact_pictures(tmp_path, video):
    write_video(tmp_path / "v", video)
    write_video(tmp_path / "v", video[:2], metadata={"seed": 1})  # takes the place of the whole folder
    names = sorted(path.name for path in (tmp_path / "v").iterdir())
    assert names == ["0001.png", "0002.png", "metadata.json"]
    for name, frame in zip(names, video[:2]):
        with Image.open(tmp_path / "v" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, video):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"expected a folder of frames, or none yet, at .*; it also holds 'thesis.doc'"
    ):
        write_frames(tmp_path, video)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "v.png", "v"])
def test_metadata_come_back_from_every_format(tmp_path, video, name):
    path = tmp_path / name
    metadata = {"prompt": "ein „Hund“, 柯基; a=b\nc\\" + "d" * 600, "seed": 2**40, "scale": 0.1, "none": None}
    write_video(path, video, metadata=metadata)
    assert read_metadata(path) == metadata
    write_video(path, video)
    assert read_metadata(path) is None


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "v.png"])
def test_a_damaged_or_missing_file_has_no_metadata(tmp_path, name):
    assert read_metadata(tmp_path / name) is None
    (tmp_path / name).write_bytes(b"no video")
    assert read_metadata(tmp_path / name) is None


def test_a_comment_of_another_program_is_no_metadata(tmp_path):
    for name, comment in (("text.gif", b"made with love"), ("list.gif", b"[1, 2]")):
        Image.new("RGB", (4, 4)).save(tmp_path / name, comment=comment)
        assert read_metadata(tmp_path / name) is None


def test_contact_sheet_shows_every_frame_in_reading_order(video):
    sheet = np.asarray(contact_sheet(video, columns=4))
    assert sheet.shape == (2 * 36 + 4, 4 * 52 + 4, 3)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]):
        tile = sheet[4 + row * 36 :, 4 + column * 52 :][:32, :48]
        np.testing.assert_array_equal(tile, video[index])


def test_comparison_shows_first_and_last_frames_of_every_method(video):
    picture = np.asarray(comparison({"one": [video], "two": [video[::-1]]}, ["a prompt"], frames_per_video=2))
    rows = [picture[-2 * 36 - 4 : -36 - 4], picture[-36 - 4 : -4]]
    for row, (first, last) in zip(rows, [(0, -1), (-1, 0)]):
        np.testing.assert_array_equal(row[:32, 190:][:, :48], video[first])
        np.testing.assert_array_equal(row[:32, 190 + 49 :][:, :48], video[last])
    with pytest.raises(ValueError, match=r"expected 2 videos .* in every row, got \{'one': 1\}"):
        comparison({"one": [video]}, ["a", "b"])


def test_float_frames_are_rounded():
    frames = np.full((1, 2, 2, 3), 0.5)
    frames[0, 0, 0] = (-0.001, 1.001, 0.999)  # less than half a level outside
    np.testing.assert_array_equal(to_uint8(frames)[0, 0], [[0, 255, 255], [128, 128, 128]])


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 4, 4, 1), (0, 4, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected frames of shape \(T, H, W, 3\)"):
        to_uint8(np.zeros(shape))


def test_unknown_extension_lists_the_known_ones(video):
    with pytest.raises(ValueError, match=r"ending in .mp4, .gif, .webp, .png, got 'v.avi'"):
        write_video("v.avi", video)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.full((2, 4, 4, 3), np.nan), "expected finite frames, got 96 values of 96 that are NaN or infinite"),
        (np.full((2, 4, 4, 3), np.inf, np.float16), "expected finite frames, got 96 values of 96"),
        (
            np.linspace(-1, 1, 96).reshape(2, 4, 4, 3),
            r"in \[0, 1\], got values from -1 to 1; of \[-1, 1\] take video / 2",
        ),
        (np.full((2, 4, 4, 3), 255.0), r"values from 255 to 255; .* of \[0, 255\] video.astype\(np.uint8\)"),
        (np.zeros((2, 4, 4, 3), int), r"expected frames of type uint8, or float in \[0, 1\], got int64"),
        (np.zeros((2, 4, 4, 3), bool), r"expected frames of type uint8, or float in \[0, 1\], got bool"),
        (np.zeros((2, 3, 4, 4)), r"expected frames of shape \(T, H, W, 3\), none of them 0, got \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16), r"expected frames as a NumPy array, got Tensor \(.*BFloat16"),
    ],
)
@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "v.png", "v"])
def test_frames_that_are_no_video_leave_no_file(tmp_path, name, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_a_picture(tmp_path, video):
    with pytest.raises(ValueError, match="expected a PIL image, got ndarray; of a video contact_sheet"):
        write_image(tmp_path / "v.png", video)
    assert not list(tmp_path.iterdir())
