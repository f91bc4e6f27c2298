"""Films that must be counted are decoded whole once; after that only what is needed."""

import os

import numpy as np
import pytest
import torch

from diffusers_mcm.data import counted, video
from diffusers_mcm.data.counted import counted_film, film_key, remember
from diffusers_mcm.data.timing import clip_positions
from diffusers_mcm.data.video import read_clip

from .conftest import encode_mp4, flat_frames, frame_numbers


@pytest.fixture(autouse=True)
def films(monkeypatch):
    monkeypatch.setattr(video, "_counted", {})
    return video


@pytest.fixture
def decoded(monkeypatch):
    """How many frames came out of decoders so far, in a list of one number."""
    count, original = [0], video._frames

    def counting(container, stream):
        for frame in original(container, stream):
            count[0] += 1
            yield frame

    monkeypatch.setattr(video, "_frames", counting)
    return count


def numbers(media, num_frames, frame_interval, uniform, fps=None):
    frames = read_clip(media, num_frames, frame_interval, 24, 32, uniform, fps)
    return frame_numbers(torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1)


def avi(num_frames=48):
    """AVI numbers frames as they are decoded."""
    return encode_mp4(flat_frames(num_frames), b_frames=2, container="avi")


@pytest.mark.parametrize("as_path", [True, False])
def test_the_second_read_of_a_film_decodes_from_a_keyframe(tmp_path, as_path, decoded):
    media = {"path": None, "bytes": avi()}
    if as_path:
        (tmp_path / "a.avi").write_bytes(media["bytes"])
        media = {"path": str(tmp_path / "a.avi"), "bytes": None}
    assert numbers(media, 2, 2, 0.999) == [45, 47]
    assert decoded[0] >= 48
    for uniform in np.linspace(0, 0.999, 12):
        decoded[0] = 0
        expected = clip_positions(48, 2, 2, uniform)
        assert numbers(media, 2, 2, uniform) == expected
        assert decoded[0] == expected[-1] - expected[0] // 8 * 8 + 1  # keyframes are at multiples of 8


def test_a_film_without_use_of_seeking_is_decoded_as_far_as_needed(decoded):
    media = {"path": None, "bytes": encode_mp4(flat_frames(24), container="h264")}
    assert not packets_tell_the_times(media)
    first = numbers(media, 3, 2, 0.5)
    decoded[0] = 0
    assert numbers(media, 3, 2, 0.5) == first == clip_positions(24, 3, 2, 0.5)
    assert decoded[0] == first[-1] + 1
    decoded[0] = 0
    assert numbers(media, 3, 2, 0.0) == [0, 2, 4]
    assert decoded[0] == 5


def packets_tell_the_times(media):
    with video.open_film(media) as container:
        return bool(video.read_index(container).labels)


def test_a_clip_by_time_is_the_same_the_second_time():
    media = {"path": None, "bytes": avi()}
    for uniform in (0.1, 0.6, 0.9):
        first = numbers(media, 4, 1, uniform, fps=4)
        assert numbers(media, 4, 1, uniform, fps=4) == first
        assert np.diff(first).tolist() == [2, 2, 2]


def test_a_file_that_was_written_anew_is_counted_anew(tmp_path):
    path = tmp_path / "a.avi"
    media = {"path": str(path), "bytes": None}
    path.write_bytes(avi(48))
    assert numbers(media, 2, 1, 0.999) == [46, 47]
    path.write_bytes(avi(24))
    os.utime(path, (1, 1))
    assert numbers(media, 2, 1, 0.999) == [22, 23]


def test_a_film_that_changed_unseen_is_counted_again(monkeypatch):
    monkeypatch.setattr(video, "film_key", lambda media: ("the same",))
    assert numbers({"path": None, "bytes": avi(48)}, 2, 1, 0.999) == [46, 47]
    assert numbers({"path": None, "bytes": avi(24)}, 2, 1, 0.999) == [22, 23]


def test_normal_films_are_not_remembered(clip):
    numbers({"path": None, "bytes": clip}, 2, 1, 0.5)
    assert len(video._counted) == 0


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(counted, "MAX_FRAMES", 100)
    media = {"path": None, "bytes": avi(8)}
    with video.open_film(media) as container:
        index = video.read_index(container)
    films = {}
    for key in range(5):
        remember(films, (key,), counted_film(index, list(range(40))))
    assert list(films) == [(3,), (4,)]
    remember(films, (3,), films.pop((3,)))
    remember(films, (5,), counted_film(index, list(range(40))))
    assert list(films) == [(3,), (5,)]  # the one that was not asked for goes
    remember(films, (6,), counted_film(index, list(range(101))))
    remember(films, None, counted_film(index, [0]))
    assert list(films) == [(3,), (5,)]


def test_keys_tell_films_apart(tmp_path):
    one, other = avi(24), bytearray(avi(24))
    other[len(other) // 2] ^= 1
    keys = {film_key({"path": "a", "bytes": bytes(data)}) for data in (one, other, one)}
    assert len(keys) == 2
    assert film_key({"path": "https://x/a.avi", "bytes": None}) is None
    assert film_key(None) is None
