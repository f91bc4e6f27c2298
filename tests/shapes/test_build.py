import csv
import json
import tarfile

import numpy as np
import pytest

from diffusers_mcm.shapes import build as build_module
from diffusers_mcm.shapes.build import build, compress, decode, encode, main, videos
from diffusers_mcm.shapes.captions import held_out, parse
from diffusers_mcm.shapes.render import render_video


def tree(directory):
    """Every file below a directory and its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def rows(path):
    with open(path / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SMALL = dict(num_videos=3, num_images=2, size=32, num_frames=8)


def test_a_folder_holds_videos_and_images_that_match_their_captions(tmp_path):
    root = build(tmp_path / "world", **SMALL, image_domains=("clean", "pastel"))
    assert sorted(p.name for p in (root / "images").iterdir()) == ["clean", "pastel"]
    labels = rows(root / "videos")
    assert len(labels) == 3 and len(rows(root / "images" / "pastel")) == 2
    for number, row in enumerate(labels):
        frames = decode((root / "videos" / row["file_name"]).read_bytes())
        assert frames.shape == (8, 32, 32, 3)
        truth = render_video(row["caption"], number, "video", 32, 8)  # seed 0: the videos' render seeds start at 0
        assert np.abs(frames.astype(float) - truth).mean() < 12


@pytest.mark.parametrize("format", ["folder", "tars"])
def test_the_same_seed_gives_the_same_bytes_and_another_others(tmp_path, format):
    first, again, other = (
        tree(build(tmp_path / name, **SMALL, image_domains=("clean",), format=format, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)


def test_tars_hold_what_the_folder_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "SHARD", 2)
    folder = build(tmp_path / "folder", **SMALL, image_domains=("clean",))
    tars = build(tmp_path / "tars", **SMALL, image_domains=("clean",), format="tars")
    assert [p.name for p in sorted((tars / "videos").iterdir())] == ["00000.tar", "00001.tar"]
    members = {}
    for path in (tars / "videos").iterdir():
        with tarfile.open(path) as tar:
            members |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    for row in rows(folder / "videos"):
        assert members[row["file_name"]] == (folder / "videos" / row["file_name"]).read_bytes()
        assert json.loads(members[row["file_name"].replace("mp4", "json")]) == {"caption": row["caption"]}


@pytest.mark.parametrize("split, expected, size", [("train", False, 516), ("held_out", True, 60)])
def test_a_split_has_all_of_its_captions_and_none_of_the_others(monkeypatch, split, expected, size):
    monkeypatch.setattr(build_module, "render_video", lambda *args: None)
    monkeypatch.setattr(build_module, "encode", lambda frames: b"")
    captions = [caption for caption, _ in videos(size + 5, split)]
    assert len(set(captions[:size])) == len(set(captions)) == size
    assert all(held_out(parse(caption)) == expected for caption in captions)


def test_no_held_out_caption_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "render_image", lambda *args: np.zeros((32, 32, 3), dtype=np.uint8))
    root = build(tmp_path / "world", num_videos=0, num_images=600, image_domains=("clean",))
    labels = rows(root / "images" / "clean")
    assert len(labels) == 600 and not any(held_out(row["caption"]) for row in labels)


def test_a_larger_set_begins_with_the_smaller_one():
    few, many = (list(videos(count, size=32, num_frames=2)) for count in (2, 4))
    assert many[:2] == few


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError("disk full")

    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(build_module, "render_image", broken)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path / "sub" / "world", **SMALL)
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_directory_with_something_in_it_is_refused_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", num_videos=1, num_images=0, size=32, num_frames=2)
    with pytest.raises(ValueError, match="empty exists and is not an empty directory"):
        build(tmp_path / "empty", num_videos=1, num_images=0, size=32, num_frames=2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(split="test"), "split must be one of train, held_out, got 'test'"),
        (dict(format="zip"), "format must be one of folder, tars, got 'zip'"),
        (dict(image_domains=("video",)), "image domain must be one of clean, cartoon, pastel, got 'video'"),
        (dict(num_videos=-1), "the number of videos must be at least 0, got -1"),
        (dict(size=33), "size must be even and at least 32, got 33"),
    ],
)
def test_wrong_settings_are_refused_with_the_right_ones(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "world", **wrong)
    assert not (tmp_path / "world").exists()


def test_encoding_gives_the_same_bytes_every_time_and_compression_keeps_the_picture():
    frames = render_video("a red circle moving left on a gray background", 0)
    assert len({encode(frames) for _ in range(20)}) == 1
    result = compress(frames)
    assert result.shape == frames.shape and result.dtype == np.uint8
    error = np.abs(result.astype(float) - frames).mean()
    assert 0.5 < error < 8  # visibly compressed, still the same clip
    assert np.abs(compress(frames, crf=10).astype(float) - frames).mean() < error


def test_odd_sizes_cannot_be_encoded():
    with pytest.raises(ValueError, match="even height and width"):
        encode(np.zeros((2, 33, 32, 3), dtype=np.uint8))


def test_the_command_builds_and_says_where(tmp_path, capsys):
    world = tmp_path / "world"
    main(
        [
            str(world),
            "--videos",
            "1",
            "--images",
            "1",
            "--image_domains",
            "cartoon",
            "--size",
            "32",
            "--num_frames",
            "2",
        ]
    )
    assert sorted(name for name in tree(world)) == [
        "build.json",
        "images/cartoon/000000.png",
        "images/cartoon/metadata.csv",
        "videos/000000.mp4",
        "videos/metadata.csv",
    ]
    assert f"{world / 'videos'}: 1 videos" in capsys.readouterr().out


def test_the_data_loader_of_the_package_reads_what_was_built(tmp_path):
    pytest.importorskip("datasets")
    from diffusers_mcm.data.sources import IMAGES, VIDEOS, open_rows

    for format, kind, path in (("folder", VIDEOS, "videos"), ("tars", IMAGES, "images/clean")):
        root = build(tmp_path / format, **SMALL, image_domains=("clean",), format=format)
        table = open_rows(str(root / path), kind)
        assert len(table) == (3 if kind is VIDEOS else 2)
        assert all(parse(table.caption(table[i])) for i in range(len(table)))
