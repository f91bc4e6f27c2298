"""Tars as people have them: which files make a sample, and what is skipped and counted instead of refusing the set."""

import os

import pytest

from diffusers_mcm.data import ImageDataset, VideoDataset
from diffusers_mcm.data.sources import IMAGES, VIDEOS, open_rows

from .conftest import captions, image_bytes, open_tar, write_tar

DOG, CAT = {"caption": "a dog"}, {"caption": "a cat"}


def skipped(rows):
    return {os.path.basename(name): reason for name, reason in rows.skipped.items()}


def test_a_sample_is_read_where_it_lies(tmp_path):
    files = {"a.mp4": b"first", "b.json": CAT, "a.json": DOG, "b.mp4": b"second", "b.vtt": "more"}
    rows = open_tar(tmp_path, files)  # members of a sample need not be neighbours
    assert captions(rows) == ["a dog", "a cat"]
    assert [rows.media(rows[i]) for i in range(2)] == [
        {"path": "a.mp4", "bytes": b"first"}, {"path": "b.mp4", "bytes": b"second"},
    ]  # fmt: skip


def test_a_container_of_its_own_for_each_shard(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.mp4": b"v", "a.json": DOG})
    write_tar(tmp_path / "1.tar", {"b.webm": b"v", "b.txt": "a cat"})  # and another notation of captions
    assert captions(open_rows(tmp_path, VIDEOS)) == ["a dog", "a cat"]


def test_images_of_several_formats(tmp_path):
    files = {"a.png": image_bytes(10), "a.txt": "x", "b.jpg": image_bytes(10, "jpg"), "b.txt": "y"}
    dataset = ImageDataset(os.path.dirname(write_tar(tmp_path / "0.tar", files)), size=8)
    assert sorted(dataset[i]["caption"] for i in range(2)) == ["x", "y"]


def test_samples_that_lack_something_are_skipped_and_counted(tmp_path, clip, caplog):
    files = {"a.mp4": clip, "a.json": b"\xef\xbb\xbf" + b'{"caption": "a dog"}', "b.mp4": clip, "c.json": CAT}
    files |= {"d.mp4": clip, "d.json": b"{", "e.mp4": clip, "e.json": b"[1]", "f.mp4": clip, "f.json": {"caption": {}}}
    write_tar(tmp_path / "0.tar", files)
    dataset = VideoDataset(tmp_path, num_frames=2, height=8, width=8)
    assert {dataset[i]["caption"] for i in range(20)} == {"a dog"}
    reasons = skipped(dataset)
    assert reasons["c.json"] == "it has no video beside it"
    assert reasons["b.mp4"] == reasons["e.mp4"] == "it has no caption"
    assert reasons["d.mp4"].startswith("its json is broken (")
    assert reasons["f.mp4"] == "its caption is neither a text nor a list of texts"
    assert "2 are skipped, 4 are left" in caplog.text


def test_texts_in_other_encodings(tmp_path, caplog):
    texts = {"a": "café".encode(), "b": "cafés".encode("latin-1"), "c": "собака".encode("cp1251")}
    files = {name: content for key, text in texts.items() for name, content in
             ((f"{key}.mp4", b"v"), (f"{key}.TXT", text))}  # fmt: skip
    rows = open_tar(tmp_path, files)
    assert [rows.caption(rows[i]) for i in range(2)] == ["café", "cafés"]
    told = f"A txt file in {tmp_path / '0.tar'} is not in UTF-8 and is read as Windows-1252. If line 1"
    assert caplog.text.count(told) == caplog.text.count("Windows-1252") == 1
    with pytest.raises(Exception, match="its txt is neither in UTF-8 nor in Windows-1252"):
        rows.caption(rows[2])


def test_captions_in_json(tmp_path):
    files = {"a.mp4": b"v", "a.json": {"Caption": ["x", "y"]}, "b.mp4": b"v", "b.json": {"Caption": 7}}
    rows = open_tar(tmp_path, files)
    assert [rows.caption(rows[0], 0.9), rows.caption(rows[1])] == ["y", "7"]


def test_fields_with_dots(tmp_path):
    files = {"a.video.mp4": b"v", "a.caption.txt": "field", "a.meta.json": {"title": "inside"}}
    assert captions(open_tar(tmp_path, files, caption_column="caption.txt")) == ["field"]
    assert captions(open_tar(tmp_path, files, caption_column="meta.json.title")) == ["inside"]
    with pytest.raises(ValueError, match=r"no caption column 'nope' .*'caption\.txt', .*'meta\.json\.title'"):
        open_tar(tmp_path, files, caption_column="nope")


def test_the_file_of_a_sample_can_be_named(tmp_path):
    files = {"a.left.mp4": b"l", "a.right.mp4": b"r", "a.json": DOG}
    with pytest.raises(ValueError, match=r"several video columns, \['left\.mp4', 'right\.mp4'\]: .*--video_column"):
        open_tar(tmp_path, files)
    rows = open_tar(tmp_path, files, media_column="right.mp4")
    assert rows.media(rows[0])["bytes"] == b"r"
    rows = open_tar(tmp_path, {"a.mp4": b"m", "a.webm": b"w", "a.json": DOG}, media_column="webm")
    assert rows.media(rows[0])["bytes"] == b"w"
    with pytest.raises(ValueError, match=r"has no video column 'gif'; its columns are \['json', 'mp4', 'webm'\]"):
        open_rows(tmp_path, VIDEOS, media_column="gif")


def test_a_tar_that_shrinks_while_it_is_read_costs_its_samples_only(tmp_path, clip):
    write_tar(tmp_path / "0.tar", {"a.mp4": clip, "a.txt": "one"})
    write_tar(tmp_path / "1.tar", {"b.mp4": clip, "b.txt": "two"})
    dataset = VideoDataset(tmp_path, num_frames=2, height=8, width=8)
    os.truncate(tmp_path / "1.tar", 100)
    assert {dataset[i]["caption"] for i in range(8)} == {"one"}
    assert dataset.skipped == {"1.tar/b.mp4": "its tar has become shorter since it was opened"}


def test_a_tar_that_is_written_anew_while_it_is_read_costs_its_samples_only(tmp_path, clip):
    """Even where other files of the same size have taken the places of its own."""
    write_tar(tmp_path / "0.tar", {"a.mp4": clip, "a.txt": "one"})
    write_tar(tmp_path / "1.tar", {"b.mp4": clip, "b.txt": "two"})
    dataset = VideoDataset(tmp_path, num_frames=2, height=8, width=8)
    write_tar(tmp_path / "1.tar", {"c.mp4": clip, "c.txt": "new"})
    assert {dataset[i]["caption"] for i in range(8)} == {"one"}
    assert dataset.skipped == {"1.tar/b.mp4": "its tar has changed since it was opened"}


def many(changed, number=300, kind="mp4"):
    """Samples of which all json is alike but that of `changed`, a name and its content."""
    files = {}
    for name in (f"{i:03d}" for i in range(number)):
        files |= {f"{name}.{kind}": b"v", f"{name}.json": changed.get(name, {"id": "7"})}
    return files


@pytest.mark.parametrize("options", [{}, {"caption_column": "caption"}, {"caption_column": "json.Caption"}])
@pytest.mark.parametrize(("kind", "suffix"), [(VIDEOS, "mp4"), (IMAGES, "png")])
def test_a_caption_that_only_one_sample_has_is_found(tmp_path, caplog, kind, suffix, options):
    files = many({"098": {"caption": "a dog"}}, kind=suffix)  # the hundred looked at are every third or so
    rows = open_tar(tmp_path, files, kind, **options)
    assert "a dog" in list(rows.all_captions())
    message = f"Captions are taken from 'caption' in the json files: 0.tar/098.{suffix} has it. None of the first 100"
    assert message in caplog.text and "their keys are ['id']" in caplog.text


def test_a_second_notation_of_captions_is_read_where_the_first_has_none(tmp_path):
    files = {"a.mp4": b"v", "a.json": {"caption": "a dog"}, "b.mp4": b"v", "b.json": {"text": "a cat"}}
    files |= {"c.mp4": b"v", "c.txt": "a cow", "d.mp4": b"v", "d.caption": "a hen"}
    assert sorted(captions(open_tar(tmp_path, files))) == ["a cat", "a cow", "a dog", "a hen"]


def test_json_that_cannot_be_read_is_named_where_no_caption_is_found(tmp_path, caplog):
    files = {"a.mp4": b"v", "a.json": "{broken", "b.mp4": b"v", "b.json": {"id": "7"}}
    with pytest.raises(
        ValueError, match=r"(?s)No caption column found .*cannot be read:\n  0\.tar/a\.mp4: its json is"
    ):
        open_tar(tmp_path, files)
    with pytest.raises(ValueError, match=r"(?s)no caption column 'title'.*cannot be read:\n  0\.tar/a\.mp4"):
        open_tar(tmp_path, files, caption_column="title")
    images = {name.replace("mp4", "png"): content for name, content in files.items()}
    assert captions(open_tar(tmp_path, images, IMAGES)) == ["", ""]
    assert (
        "No captions were found beside the images" in caplog.text and "0.tar/a.png: its json is broken" in caplog.text
    )
