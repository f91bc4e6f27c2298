"""Items keyed by the global index: order, starts, replacements, and what is counted."""

import logging
import pickle

import pytest
import torch

from diffusers_mcm.data import ImageDataset, VideoDataset
from diffusers_mcm.data import video as module
from diffusers_mcm.data.dataset import _candidate_rows, keyed_fraction

from .conftest import frame_numbers, image_bytes


def open_videos(source, seed=0, num_frames=4, **options):
    return VideoDataset(source, num_frames=num_frames, frame_interval=2, height=16, width=16, seed=seed, **options)


def test_item_has_the_layout_and_the_frames(video_folder):
    item = open_videos(video_folder)[0]
    assert item["pixels"].shape == (3, 4, 16, 16)
    assert item["pixels"].dtype == torch.float32
    assert item["pixels"].abs().max() <= 1
    numbers = frame_numbers(item["pixels"])
    assert [b - a for a, b in zip(numbers, numbers[1:], strict=False)] == [2, 2, 2]


def test_interval_shrinks_to_a_short_clip(video_folder):
    dataset = VideoDataset(video_folder, num_frames=8, frame_interval=100, height=8, width=8)
    numbers = frame_numbers(dataset[0]["pixels"])
    assert [b - a for a, b in zip(numbers, numbers[1:], strict=False)] == [3] * 7  # 24 frames hold 8 at interval 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_are_clips_of_one_frame(tmp_path, suffix):
    """JPEG and WebP store other colours than were given; 2 of 255 levels is what their rounding changes here."""
    for number in range(3):
        (tmp_path / f"{number}.{suffix}").write_bytes(image_bytes(60 * number, suffix))
    rows = [f"{number}.{suffix},gray {60 * number}" for number in range(3)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    dataset = open_videos(tmp_path, num_frames=1)
    for item in (dataset[index] for index in range(3)):
        assert item["pixels"].shape == (3, 1, 16, 16)
        levels = (item["pixels"] + 1) * 127.5
        assert (levels - int(item["caption"].removeprefix("gray "))).abs().max() <= (1e-3 if suffix == "png" else 2)
    assert not dataset.skipped
    with pytest.raises(ValueError, match="it has 1 frames, fewer than the 2 asked for"):
        open_videos(tmp_path, num_frames=2)[0]


def test_each_epoch_holds_every_row_once_in_a_new_order():
    epochs = [[next(_candidate_rows(50, 0, "videos", e * 50 + i)) for i in range(50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [next(_candidate_rows(50, 1, "videos", i)) for i in range(50)]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 12])
def test_replacements_reach_every_row_once(num_rows):
    for index in range(20):
        assert sorted(_candidate_rows(num_rows, 3, "videos", index)) == list(range(num_rows))


def test_draws_are_uniform_and_keyed():
    draws = torch.tensor([keyed_fraction(0, "a", i) for i in range(4000)], dtype=torch.float64)
    assert abs(float(draws.mean()) - 0.5) < 0.02
    assert abs(float(draws.var()) - 1 / 12) < 0.005
    assert len({keyed_fraction(s, p, i) for s in (0, 1) for p in "ab" for i in (0, 1)}) == 8


def test_items_depend_on_seed_and_index_only(video_folder):
    first, second, other = open_videos(video_folder), open_videos(video_folder), open_videos(video_folder, seed=1)
    items = [first[i] for i in range(8)]
    for i in reversed(range(8)):
        assert torch.equal(items[i]["pixels"], second[i]["pixels"])
        assert items[i]["caption"] == second[i]["caption"]
    assert any(not torch.equal(items[i]["pixels"], other[i]["pixels"]) for i in range(8))


def test_unusable_clips_are_replaced_counted_and_named(mixed_folder, caplog):
    dataset = open_videos(mixed_folder)
    with caplog.at_level(logging.WARNING):
        items = [dataset[i] for i in range(12)]
    assert {item["caption"] for item in items} == {"one", "two"}
    reasons = {name.rsplit("/", 1)[-1]: reason for name, reason in dataset.skipped.items()}
    assert set(reasons) == {"short.mp4", "broken.mp4", "missing.mp4", "silent.mp4"}
    assert reasons["short.mp4"] == "it has 3 frames, fewer than the 4 asked for"
    assert reasons["silent.mp4"] == "it has no caption"
    assert "No such file" in reasons["missing.mp4"]
    for name in reasons:
        assert sum(name in message for message in caplog.messages) == 1  # named, and once only
    assert "(4 skipped so far)" in caplog.messages[-1]
    fresh = open_videos(mixed_folder)
    for i in (11, 5, 0):  # replacements do not depend on what was read before
        assert torch.equal(fresh[i]["pixels"], items[i]["pixels"])


def test_nothing_usable_is_an_error(video_folder):
    dataset = open_videos(video_folder, num_frames=25)
    with pytest.raises(ValueError, match=r"(?s)yields nothing: none of the 5 items .*24 frames, fewer than the 25"):
        dataset[0]


def test_wrong_numbers_are_refused(video_folder):
    with pytest.raises(ValueError, match="num_frames must be 1 or more, not 0"):
        open_videos(video_folder, num_frames=0)
    with pytest.raises(IndexError, match="0 or more, not -1"):
        open_videos(video_folder)[-1]


def test_frames_of_the_clips_are_given_beside_them(video_folder):
    """One of each part of the clip, the same ones whether or not the clip itself is looked at."""
    judged, blind = (
        open_videos(video_folder, decodes=decodes, judged_frames=2) for decodes in (None, lambda index: False)
    )
    seen = set()
    for index in range(20):
        item, unseen = judged[index], blind[index]
        assert item["frames"].shape == (2, 3, 16, 16) and torch.equal(item["frames"], unseen["frames"])
        assert item["caption"] == unseen["caption"] and (unseen["pixels"] == -1).all()
        places = [
            place for place in range(4) for frame in item["frames"] if torch.equal(item["pixels"][:, place], frame)
        ]
        assert len(places) == 2 and places[0] < 2 <= places[1]
        seen.update(places)
    assert seen == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="judged_frames must be from 0 to the clip's 4 frames, not 5"):
        open_videos(video_folder, judged_frames=5)


@pytest.mark.parametrize("judged_frames", [0, 2])
def test_a_clip_that_is_not_looked_at_is_not_decoded_but_must_be_there(mixed_folder, judged_frames, monkeypatch):
    """The replacements are the same ones as where every clip is decoded."""
    options = dict(judged_frames=judged_frames)
    whole, blind = open_videos(mixed_folder, **options), open_videos(mixed_folder, decodes=is_even, **options)
    expected = [whole[index] for index in range(24)]
    decoded = []
    original = module._Pictures.take
    monkeypatch.setattr(module._Pictures, "take", lambda *args: decoded.append(args[1]) or original(*args))
    for index, item in enumerate(expected):
        decoded.clear()
        found = blind[index]
        assert found["caption"] == item["caption"]
        assert torch.equal(found["pixels"], item["pixels"] if is_even(index) else -torch.ones_like(item["pixels"]))
        assert bool(decoded) == (is_even(index) or judged_frames > 0)
    assert blind.skipped == whole.skipped and len(blind.skipped) == 4


def is_even(index):
    return index % 2 == 0


def test_videos_that_give_no_clip_give_no_frames_either(video_folder):
    """Their captions would stand beside real frames and never beside a clip."""
    frames = open_videos(video_folder, num_frames=100, decodes=lambda index: False, judged_frames=2)
    with pytest.raises(ValueError, match="it has 24 frames, fewer than the 100 asked for"):
        frames[0]


def test_broken_image_is_replaced(tmp_path):
    (tmp_path / "good.png").write_bytes(image_bytes(100))
    (tmp_path / "bad.png").write_bytes(image_bytes(100)[:40])
    dataset = ImageDataset(tmp_path, size=8)
    assert all(round(float((dataset[i]["pixels"].mean() + 1) * 127.5)) == 100 for i in range(4))
    assert [name.rsplit("/", 1)[-1] for name in dataset.skipped] == ["bad.png"]


def test_pickled_data_set_reads_the_same(video_folder):
    dataset = open_videos(video_folder)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3]["pixels"], dataset[3]["pixels"])


def test_a_rate_instead_of_an_interval(video_folder):
    """The clips have 8 frames per second."""
    dataset = VideoDataset(video_folder, num_frames=4, height=16, width=16, fps=2)
    numbers = frame_numbers(dataset[0]["pixels"])
    assert [b - a for a, b in zip(numbers, numbers[1:], strict=False)] == [4, 4, 4]
    with pytest.raises(ValueError, match=r"Give frame_interval \(8\) or fps \(2\), not both"):
        VideoDataset(video_folder, frame_interval=8, fps=2)
    with pytest.raises(ValueError, match="fps must be greater than 0, not nan"):
        VideoDataset(video_folder, fps=float("nan"))


def test_of_so_many_windows_the_first_epochs_clips_come_again(video_folder):
    """In a new order, each once in an epoch, with its start and its caption; the first epochs are as without."""
    every, windows = open_videos(video_folder), open_videos(video_folder, windows=2)
    count = len(every)
    assert [windows.key(index) for index in range(2 * count)] == list(range(2 * count))
    for epoch in range(2, 6):
        keys = [windows.key(epoch * count + place) for place in range(count)]
        assert sorted(keys) == [epoch % 2 * count + place for place in range(count)]
        for place, key in enumerate(keys):
            one, other = windows[epoch * count + place], every[key]
            assert torch.equal(one["pixels"], other["pixels"]) and one["caption"] == other["caption"]
    orders = [[windows.key(epoch * count + place) % count for place in range(count)] for epoch in range(2, 12)]
    assert any(order != orders[0] for order in orders)
    with pytest.raises(ValueError, match="windows must be 1 or more, not 0"):
        open_videos(video_folder, windows=0)
