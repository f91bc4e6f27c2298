"""Features by shards: kept, taken up again, shared among processes, and nothing that is skipped goes unnamed."""

import io
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.evaluation import measuring
from diffusers_mcm.evaluation.measuring import (
    Measure,
    Measured,
    Processes,
    clipsim_measure,
    content_measure,
    frame_measure,
    measure,
    measured_before,
    motion_measure,
    video_measure,
)
from diffusers_mcm.evaluation.networks import load_clip, load_dinov2, load_videomae
from diffusers_mcm.evaluation.samples import open_samples
from diffusers_mcm.evaluation.videos import Window, open_reference
from diffusers_mcm.video_io import encode_mp4, write_video
from tests.evaluation.conftest import CAPTIONS, write_samples

WINDOW = Window(8, 1, None, "start", 64, 64)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(measuring, "SHARD", 2)


@pytest.fixture
def six(tmp_path):
    return open_samples(write_samples(tmp_path / "mcm4"))


class Counting:
    """The mean brightness of each clip, and how often it was asked for."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = 0, fails_at

    def __call__(self, frames, captions):
        if self.fails_at == self.seen:
            raise KeyboardInterrupt
        self.seen += 1
        return frames.reshape(len(frames), -1).mean(1, keepdims=True)


def brightness(counting):
    return {"brightness": Measure(counting, "1")}


def test_features_are_computed_once(six, tmp_path):
    first, again = Counting(), Counting()
    found = measure(six, WINDOW, 0, brightness(first), tmp_path / "features")
    kept = measure(six, WINDOW, 0, brightness(again), tmp_path / "features")
    assert (first.seen, again.seen) == (3, 0)
    assert found.values["brightness"].shape == (6, 1)
    np.testing.assert_array_equal(found.values["brightness"], kept.values["brightness"])


def test_a_run_that_was_stopped_goes_on(six, tmp_path):
    whole = measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(six, WINDOW, 0, brightness(Counting(fails_at=2)), tmp_path / "features")
    rest = Counting()
    found = measure(six, WINDOW, 0, brightness(rest), tmp_path / "features")
    assert rest.seen == 1
    np.testing.assert_array_equal(found.values["brightness"], whole.values["brightness"])


@pytest.mark.parametrize("change", ["window", "seed", "network", "file"])
def test_what_decides_the_features_makes_them_anew(six, tmp_path, change):
    measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "features")
    counting, window = Counting(), WINDOW._replace(num_frames=4) if change == "window" else WINDOW
    if change == "file":
        write_samples(tmp_path / "mcm4", change=lambda video: 255 - video)
        six = open_samples(tmp_path / "mcm4")
    key = "2" if change == "network" else "1"
    measures = {"brightness": Measure(counting, key)}
    measure(six, window, 1 if change == "seed" else 0, measures, tmp_path / "features")
    assert counting.seen == 3


def test_two_processes_share_the_work_and_find_what_one_does(six, tmp_path):
    alone = measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "alone")
    barrier, counted = threading.Barrier(2, timeout=60), [Counting(), Counting()]

    def of(index):
        processes = Processes(index, 2, barrier.wait)
        return measure(six, WINDOW, 0, brightness(counted[index]), tmp_path / "both", processes)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of, (0, 1)))
    assert [each.seen for each in counted] == [2, 1]  # of three shards
    for each in found:
        np.testing.assert_array_equal(each.values["brightness"], alone.values["brightness"])


def test_a_broken_video_is_named_and_the_others_measured(six, tmp_path):
    broken = tmp_path / "mcm4" / "0002-clip.mp4"
    broken.write_bytes(b"no video")
    found = measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "features")
    assert [video.caption for video in found.videos] == [CAPTIONS[0], *CAPTIONS[2:]]
    assert list(found.skipped) == [str(broken)] and "cannot be read" in found.skipped[str(broken)]
    assert len(found.values["brightness"]) == 5


def test_a_set_of_which_nothing_can_be_used(six, tmp_path):
    for path in (tmp_path / "mcm4").glob("*.mp4"):
        path.write_bytes(b"no video")
    with pytest.raises(
        ValueError, match="at least 2 videos of .*mcm4 that can be used, got 0; for example .*0001-clip.mp4: "
    ):
        measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "features")


def test_a_shard_of_broken_videos_alone(six, tmp_path):
    for name in ("0003", "0004"):  # the second shard
        (tmp_path / "mcm4" / f"{name}-clip.mp4").write_bytes(b"no video")
    found = measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "features")
    assert len(found.videos) == len(found.values["brightness"]) == 4 and len(found.skipped) == 2


def unread(video):
    """The same video, which cannot be read this time though its file stays as it is."""

    def read(window, start):
        raise UnusableItem("Permission denied")

    return video._replace(read=read)


def but(videos, place):
    """A set of which one video cannot be read."""
    return replace(videos, videos=[unread(v) if n == place else v for n, v in enumerate(videos.videos)])


def test_what_could_not_be_read_is_tried_again(six, tmp_path):
    first, again, later = Counting(), Counting(), Counting()
    found = measure(but(six, 2), WINDOW, 0, brightness(first), tmp_path / "features")
    assert len(found.videos) == 5 and list(found.skipped.values()) == ["Permission denied"]
    measure(but(six, 2), WINDOW, 0, brightness(again), tmp_path / "features")
    mended = measure(six, WINDOW, 0, brightness(later), tmp_path / "features")
    assert (first.seen, again.seen, later.seen) == (3, 0, 1)  # computed again where there is more to compute of
    whole = measure(six, WINDOW, 0, brightness(Counting()), tmp_path / "whole")
    assert len(mended.videos) == 6 and not mended.skipped
    np.testing.assert_array_equal(mended.values["brightness"], whole.values["brightness"])


@pytest.mark.parametrize("mended", [True, False], ids=["mended", "broken"])
def test_a_measure_that_is_added_is_of_the_same_videos(six, tmp_path, mended):
    """Where another video can be read by then, the other measures are computed again as well."""
    before, after = (but(six, 0), six) if mended else (six, but(six, 0))
    measure(before, WINDOW, 0, brightness(Counting()), tmp_path / "features")
    more = brightness(Counting()) | {"again": Measure(Counting(), "2")}
    found = measure(after, WINDOW, 0, more, tmp_path / "features")
    assert len(found.videos) == len(found.values["fps"]) == (6 if mended else 5)
    np.testing.assert_array_equal(found.values["brightness"], found.values["again"])
    told = [video.read(WINDOW, 0).mean() for video in found.videos]
    np.testing.assert_allclose(found.values["brightness"][:, 0], told)


def test_features_of_several_sets_of_videos_are_no_set(six, tmp_path):
    """As a version left them that did not compute all measures again."""
    folder, measures = tmp_path / "features", {name: Measure(Counting(), "1") for name in ("one", "two")}
    measure(six, WINDOW, 0, measures, folder)
    measure(but(six, 1), WINDOW, 0, {"two": measures["two"]}, tmp_path / "fewer")
    (fewer,) = (tmp_path / "fewer").glob("two-00000-*.safetensors")
    shutil.copy(fewer, folder)
    with pytest.raises(ValueError, match="expected one and two of the same videos in .*features, got 2 and 1 of one"):
        measured_before(folder, WINDOW, 0, measures).read()
    assert len(measure(six, WINDOW, 0, measures, folder).values["two"]) == 6


def test_shapes_of_features(six, tmp_path, videomae):
    measures = {
        "video.videomae": video_measure(load_videomae(videomae), 4),
        "frame.dinov2": frame_measure(load_dinov2("mcm-shapes-features"), 4),
        "clipsim": clipsim_measure(load_clip("mcm-shapes-clip"), 4),
        "motion": motion_measure(),
    }
    values = measure(six, WINDOW, 0, measures, tmp_path / "features").values
    shapes = {name: found.shape for name, found in values.items()}
    assert shapes.pop("fps") == (6,)
    assert shapes == {"video.videomae": (6, 16), "frame.dinov2": (6, 8, 64), "clipsim": (6,), "motion": (6, 3)}
    assert values["clipsim"].min() > 55  # true captions
    per_video = video_measure(load_videomae(videomae), 1).compute
    frames = np.stack([six.videos[0].read(WINDOW, 0.0), six.videos[1].read(WINDOW, 0.0)])
    # a batch of one adds up in another order: float32 has 7 digits
    np.testing.assert_allclose(per_video(frames, []), values["video.videomae"][:2], rtol=1e-3, atol=1e-4)


def test_frames_that_are_replaced_in_their_folder_are_measured_anew(tmp_path):
    for index in range(2):
        write_video(tmp_path / "clips" / f"{'ab'[index]}-0", np.full((8, 8, 8, 3), 50, np.uint8))

    def found():
        measures = brightness(Counting())
        return measure(open_samples(tmp_path / "clips"), WINDOW, 0, measures, tmp_path / "f").values["brightness"]

    assert found()[0] == 50
    for path in (tmp_path / "clips" / "a-0").glob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    assert found().tolist() == [[0], [50]]


def test_a_tar_that_is_replaced_is_measured_anew(tmp_path):
    def write(level):
        with tarfile.open(tmp_path / "world.tar", "w") as tar:
            for number in range(2):
                video = encode_mp4(np.full((8, 16, 16, 3), level, np.uint8))
                for name, data in ((f"{number}.mp4", video), (f"{number}.json", b'{"caption": "c"}')):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    def found():
        real = open_reference(str(tmp_path / "world.tar"), None, 0)
        return measure(real, WINDOW, 0, brightness(Counting()), tmp_path / "f").values["brightness"]

    write(40)
    assert found()[0] == pytest.approx(40, abs=2)
    write(200)
    assert found()[0] == pytest.approx(200, abs=2)


def test_contents_are_those_of_the_pixels():
    black, white = (np.full((2, 4, 8, 8, 3), level, np.uint8) for level in (0, 255))

    def contents(frames):
        values = {"content": content_measure().compute(frames, [])}
        return Measured([None] * len(frames), {}, values).contents()

    assert contents(black) == contents(black.copy()) != contents(white)
    assert contents(np.concatenate([black, white])) == contents(np.concatenate([white, black]))
