"""Which files of a tar make a sample, and tars that are broken in one way or another."""

import gzip
import io
import tarfile

import pytest

from diffusers_mcm.data.sources import IMAGES, VIDEOS, open_rows

from .conftest import captions, open_tar, write_tar

DOG, CAT = {"caption": "a dog"}, {"caption": "a cat"}


@pytest.mark.parametrize("names", [("clip.v1", "clip.v2"), ("vid_1.5s", "vid_2.5s"), ("x/a", "y/a"), ("犬 é", "b b")])
@pytest.mark.parametrize("suffixes", [("mp4", "mp4"), ("mp4", "webm"), ("MP4", "mkv")])
def test_names_folders_and_containers(tmp_path, names, suffixes):
    files = {}
    for name, suffix, text in zip(names, suffixes, (DOG, CAT), strict=True):
        files |= {f"{name}.{suffix}": b"v", f"{name}.json": text}
    rows = open_tar(tmp_path, files)
    assert captions(rows) == ["a dog", "a cat"]
    assert not rows.skipped
    assert [rows.name(i, rows[i]) for i in range(2)] == [f"0.tar/{n}.{s}" for n, s in zip(names, suffixes)]


def test_what_a_mac_adds_is_left_out(tmp_path):
    files = {"._a.mp4": b"mac", "a.mp4": b"v", "._a.json": b"mac", "a.json": DOG, ".DS_Store": b"", "./x/._y.mp4": b""}
    rows = open_tar(tmp_path, files)
    assert captions(rows) == ["a dog"]
    assert not rows.skipped


def test_a_second_file_of_the_kind_is_not_taken_for_a_sample(tmp_path):
    rows = open_tar(tmp_path, {"a.mp4": b"clip", "a.mask.mp4": b"mask", "a.json": DOG})
    assert [rows.media(rows[i])["bytes"] for i in range(len(rows))] == [b"clip"]
    assert "part of a.mp4; read it with --video_column mask.mp4" in rows.skipped["0.tar/a.mask.mp4"]
    rows = open_tar(tmp_path, {"a.png": b"1", "a.depth.png": b"2", "b.1.png": b"3", "b.2.png": b"4"}, IMAGES)
    assert [rows.media(rows[i])["bytes"] for i in range(len(rows))] == [b"1", b"3", b"4"]


def test_links_within_a_tar(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.mp4", b"v"), ("a.txt", b"x"), ("b.txt", b"y")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = tarfile.LNKTYPE, "a.mp4"
        tar.addfile(link)
    rows = open_rows(tmp_path, VIDEOS)
    assert captions(rows) == ["x", "y"]
    assert rows.media(rows[1]) == {"path": "b.mp4", "bytes": b"v"}


@pytest.fixture
def good(tmp_path):
    """The bytes of a tar of two samples; its third header begins at byte 2048."""
    path = write_tar(tmp_path / "good", {"a.mp4": b"v", "a.json": DOG, "b.mp4": b"w" * 5000, "b.json": CAT})
    with open(path, "rb") as file:
        return file.read()


def broken_shards(good):
    holds_nothing = bytes(10240)
    return {
        "zero bytes": (b"", "it is empty (0 bytes)", []),
        "no files": (holds_nothing, "it holds no files", []),
        "html": (b"<html>404</html>" * 50, "it is not a tar (invalid header): it begins with b'<html>404", []),
        "gzip": (gzip.compress(good), "unpack it with gunzip", []),
        "cut in a file": (
            good[:3000],
            "it is broken (unexpected end of data); read are the 2 files before",
            ["a dog"],
        ),
        "cut in the second": (good[:800], "it is broken (unexpected end of data); read are the 1", []),
        "cut between files": (good[:2048], "it breaks off without an end mark; read are the 2", ["a dog"]),
        "a broken header": (
            good[:2048] + b"\xff" * 512 + good[2560:],
            "it cannot be read from byte 2048 on; read are the 2",
            ["a dog"],
        ),
    }


@pytest.mark.parametrize("what", broken_shards(b""))
@pytest.mark.parametrize("place", ["0.tar", "2.tar"])
def test_a_broken_shard_is_skipped_and_counted(tmp_path, good, what, place):
    content, reason, kept = broken_shards(good)[what]
    (tmp_path / "1.tar").write_bytes(good)
    (tmp_path / place).write_bytes(content)
    rows = open_rows(tmp_path, VIDEOS)
    assert sorted(captions(rows)) == sorted(["a dog", "a cat", *kept])
    assert reason in rows.skipped[str(tmp_path / place)]


@pytest.mark.parametrize("what", ["zero bytes", "no files", "html", "gzip"])
def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path, good, what):
    content, reason, _ = broken_shards(good)[what]
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, VIDEOS)
    assert str(error.value).startswith(f"None of the 1 tars of {str(tmp_path)!r} can be read:")
    assert "0.tar: " in str(error.value) and reason in str(error.value)


def test_compressed_tars_are_seen(tmp_path, good):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(good))
    (tmp_path / "1.tar").write_bytes(good)
    rows = open_rows(tmp_path, VIDEOS)
    assert len(rows) == 2
    assert "unpack it with gunzip" in rows.skipped[str(tmp_path / "0.tar.gz")]
    assert len(open_rows(str(tmp_path / "*.tar"), VIDEOS)) == 2
