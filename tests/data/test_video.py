"""Decoding a clip: the right frames, no others, and clear reasons when it cannot be done."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mcm.data import video
from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.images import fit
from diffusers_mcm.data.timing import clip_positions
from diffusers_mcm.data.video import read_clip

from .conftest import encode_mp4, flat_frames, frame_numbers, read_numbers


@pytest.mark.parametrize(
    ("available", "frames", "interval", "uniform", "expected"),
    [
        (100, 4, 8, 0.0, [0, 8, 16, 24]),
        (100, 4, 8, 0.9999, [75, 83, 91, 99]),
        (25, 4, 8, 0.9999, [0, 8, 16, 24]),
        (24, 4, 8, 0.0, [0, 7, 14, 21]),  # 24 frames hold 4 at interval 7
        (24, 4, 8, 0.9999, [2, 9, 16, 23]),
        (4, 4, 8, 0.5, [0, 1, 2, 3]),
        (5, 1, 8, 0.5, [2]),
    ],
)
def test_clip_positions(available, frames, interval, uniform, expected):
    assert clip_positions(available, frames, interval, uniform) == expected


def test_every_start_is_reached_equally_often():
    starts = [clip_positions(20, 4, 4, (k + 0.5) / 800)[0] for k in range(800)]
    assert np.bincount(starts).tolist() == [100] * 8


def test_too_few_frames_says_both_numbers():
    with pytest.raises(UnusableItem, match="it has 15 frames, fewer than the 16 asked for"):
        clip_positions(15, 16, 1, 0.0)


@pytest.mark.parametrize("container", ["mp4", "mkv", "mpegts", "avi", "h264"])  # AVI numbers frames as decoded
@pytest.mark.parametrize("b_frames", [0, 2])
def test_frames_are_the_ones_asked_for(container, b_frames):
    data = encode_mp4(flat_frames(24), b_frames=b_frames, container=container)
    for uniform in (0.0, 0.4, 0.7, 0.9999):
        assert read_numbers(data, 3, 2, uniform) == clip_positions(24, 3, 2, uniform)


def test_seeks_to_the_keyframe_and_stops_after_the_last_frame(clip, monkeypatch):
    decoded = []
    original = video._frames

    def counting(container, stream):
        for frame in original(container, stream):
            decoded.append(int(frame.time * 8))
            yield frame

    monkeypatch.setattr(video, "_frames", counting)
    assert read_numbers(clip, 2, 2, 0.999) == [21, 23]
    assert decoded == list(range(16, 24))  # from the keyframe at 16
    decoded.clear()
    assert read_numbers(clip, 2, 2, 0.0) == [0, 2]
    assert decoded == [0, 1, 2]


def test_inexact_seek_falls_back_to_the_beginning(clip, monkeypatch):
    monkeypatch.setattr(video, "_decode", lambda *args: None)
    assert read_numbers(clip, 2, 2, 0.999) == [21, 23]


def test_every_start_of_a_program_stream_is_read():
    """Seeking searches such a file by decoding times and lands late."""
    data = encode_mp4(flat_frames(48), gop=12, b_frames=2, container="mpeg", codec="mpeg2video", rate=24)
    for uniform in np.linspace(0, 0.999, 6):
        assert read_numbers(data, 3, 2, uniform) == clip_positions(48, 3, 2, uniform)


def test_a_film_by_time(clip):
    """8 frames per second; the clip starts with a frame, and times are met to within half a frame."""
    media = {"path": None, "bytes": clip}
    for fps, expected in ((8, [0, 1, 2, 3]), (4, [0, 2, 4, 6]), (1, [0, 8, 15, 23]), (16, [0, 0, 1, 1])):
        frames = read_clip(media, 4, 5, 24, 32, 0.0, fps=fps)
        assert frame_numbers(torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1) == expected


@pytest.mark.parametrize("container", ["mp4", "mkv", "mpegts", "avi", "mpeg"])
def test_whatever_is_broken_is_unusable_or_read(container):
    codec = dict(codec="mpeg2video", rate=24) if container == "mpeg" else {}
    data = encode_mp4(flat_frames(24), b_frames=2, container=container, **codec)
    random, usable = np.random.default_rng(0), 0
    for trial in range(40):
        broken = bytearray(data[: random.integers(1, len(data))] if trial % 4 == 0 else data)
        for place in random.integers(0, len(broken), 1 + trial % 8):
            broken[place] = random.integers(0, 256)
        try:
            frames = read_clip(
                {"path": None, "bytes": bytes(broken)}, 3, 2, 8, 8, random.random(), [None, 5.0][trial % 2]
            )
        except UnusableItem:
            continue
        usable += frames.shape == (3, 8, 8, 3)
    assert usable


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ({"path": "/nowhere/clip.mp4", "bytes": None}, "cannot be read .*No such file"),
        ({"path": None, "bytes": b"not a video"}, "cannot be read .*Invalid data"),
        ({"path": None, "bytes": None}, "neither a file nor its bytes"),
        (None, "neither a file nor its bytes"),
    ],
)
def test_unreadable_video_gives_its_reason(media, reason):
    with pytest.raises(UnusableItem, match=reason):
        read_clip(media, 2, 1, 8, 8, 0.0)


def test_damaged_stream_is_unusable(clip):
    damaged = bytearray(clip)
    start = damaged.index(b"mdat") + 4
    damaged[start : start + 4000] = bytes(4000)
    with pytest.raises(UnusableItem):
        read_clip({"path": None, "bytes": bytes(damaged)}, 24, 1, 8, 8, 0.0)


def test_fit_is_scaling_then_centre_crop():
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    scaled = image.resize((64, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled)[:, 16:48].astype(int)
    assert np.abs(np.asarray(fit(image, 32, 32)).astype(int) - expected).max() <= 1
    assert np.array_equal(np.asarray(fit(image, 48, 96)), noise)  # nothing to do


@pytest.mark.parametrize("size", [(368, 240), (241, 367), (1, 1), (31, 33)])
def test_fit_takes_any_size(size):
    assert fit(Image.new("RGB", size, (9, 9, 9)), 64, 48).size == (48, 64)


def test_each_frame_is_scaled_before_the_next_is_decoded(clip, monkeypatch):
    """Sixteen whole frames of a large film would take hundreds of megabytes in each worker."""
    events, frames, picture = [], video._frames, video.picture

    def decoding(container, stream):
        for number, frame in enumerate(frames(container, stream)):
            events.append(number)
            yield frame

    def scaling(*args):
        events.append("scaled")
        return picture(*args)

    monkeypatch.setattr(video, "_frames", decoding)
    monkeypatch.setattr(video, "picture", scaling)
    assert read_numbers(clip, 3, 2, 0.0) == [0, 2, 4]
    assert events == [0, "scaled", 1, 2, "scaled", 3, 4, "scaled"]
