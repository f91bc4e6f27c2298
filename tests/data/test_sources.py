"""Every place data may come from, and the messages when it does not fit."""

import json

import datasets
import pytest

from diffusers_mcm.data import ImageDataset, VideoDataset
from diffusers_mcm.data.columns import VIDEOS, DataRequest
from diffusers_mcm.data.sources import _find_caption, _values

from .conftest import image_bytes, write_tar


def open_videos(source, **options):
    return VideoDataset(source, num_frames=4, frame_interval=2, height=16, width=16, **options)


def captions(dataset):
    return sorted(dataset[i]["caption"] for i in range(len(dataset)))


def test_video_folder(video_folder):
    dataset = open_videos(video_folder)
    assert captions(dataset) == [f"clip {i}" for i in range(5)]
    assert not dataset.skipped


def test_video_folder_with_splits(tmp_path, clip):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.mp4").write_bytes(clip)
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "caption": split}) + "\n")
    assert captions(open_videos(tmp_path)) == ["train"]
    assert captions(open_videos(tmp_path, split="validation")) == ["validation"]
    with pytest.raises(ValueError, match=r"no subfolder 'test' .*found \['train', 'validation'\]"):
        open_videos(tmp_path, split="test")


@pytest.mark.parametrize("extension", ["json", "txt"])
def test_video_tars(tmp_path, clip, extension):
    for shard in range(2):
        files = {}
        for k in range(2):
            caption = f"caption {shard}{k}"
            files[f"{k:03d}.mp4"] = clip
            files[f"{k:03d}.{extension}"] = caption if extension == "txt" else {"caption": caption, "id": k}
        write_tar(tmp_path / f"shard-{shard}.tar", files)
    expected = ["caption 00", "caption 01", "caption 10", "caption 11"]
    assert captions(open_videos(tmp_path)) == expected
    assert captions(open_videos(str(tmp_path / "shard-*.tar"))) == expected
    assert captions(open_videos(tmp_path / "shard-1.tar")) == expected[2:]


def test_tars_whose_json_varies(tmp_path, clip):
    files = {}
    for k in range(8):
        files[f"{k}.mp4"] = clip
        files[f"{k}.json"] = {"caption": f"c{k}", "note": None} if k < 6 else {"caption": f"c{k}", "note": "x", "n": 1}
    write_tar(tmp_path / "a.tar", files)
    assert captions(open_videos(tmp_path)) == [f"c{k}" for k in range(8)]


def test_tars_of_something_else(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": image_bytes(9), "0.json": {"caption": "c"}})
    with pytest.raises(ValueError, match=r"hold no video files .*they hold \['json', 'png'\]"):
        open_videos(tmp_path)


def test_tar_without_captions(tmp_path, clip):
    write_tar(tmp_path / "a.tar", {"0.mp4": clip, "0.json": {"id": 1}})
    with pytest.raises(ValueError, match=r"No caption column found .*'json.id'"):
        open_videos(tmp_path)


def test_webm_in_a_tar_and_caption_key(tmp_path, clip):
    write_tar(tmp_path / "a.tar", {"0.webm": clip, "0.json": {"title": "found", "text": "other"}})
    assert captions(open_videos(tmp_path, caption_column="title")) == ["found"]
    assert captions(open_videos(tmp_path, caption_column="json.title")) == ["found"]
    assert captions(open_videos(tmp_path)) == ["other"]


@pytest.fixture
def hub(monkeypatch):
    """Let `load_dataset("owner/name")` find the tables given."""
    tables, load_dataset = {}, datasets.load_dataset

    def load(path, *args, **kwargs):
        return tables[path] if path in tables else load_dataset(path, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("diffusers_mcm.data.sources._open_in_place", lambda request: None)
    return tables


def test_hub_videos(hub, clip):
    table = datasets.Dataset.from_dict({"clip": [{"bytes": clip, "path": None}], "name": ["x"], "prompt": ["a"]})
    hub["owner/videos"] = table.cast_column("clip", datasets.Video(decode=False))
    assert captions(open_videos("owner/videos")) == ["a"]
    assert captions(open_videos("owner/videos", caption_column="name")) == ["x"]
    with pytest.raises(ValueError, match=r"no caption column 'nope' of text; its columns are \['clip', 'name'"):
        open_videos("owner/videos", caption_column="nope")
    with pytest.raises(ValueError, match=r"no video column 'nope'; its columns are \['clip', 'name', 'prompt'\]"):
        open_videos("owner/videos", video_column="nope")


def test_columns_that_do_not_fit_are_listed(hub, clip):
    hub["owner/urls"] = datasets.Dataset.from_dict({"contentUrl": ["http://x"], "page": [1]})
    with pytest.raises(ValueError, match=r"No video column found in 'owner/urls'.*\['contentUrl', 'page'\]"):
        open_videos("owner/urls")
    hub["owner/silent"] = datasets.Dataset.from_dict({"video": ["a.mp4"], "label": [1]})
    with pytest.raises(ValueError, match=r"No caption column found in 'owner/silent'.*\['video', 'label'\]"):
        open_videos("owner/silent")
    table = datasets.Dataset.from_dict({"left": ["a.mp4"], "right": ["a.mp4"], "text": ["a"]})
    for name in ("left", "right"):
        table = table.cast_column(name, datasets.Video(decode=False))
    hub["owner/two"] = table
    with pytest.raises(ValueError, match=r"several video columns, \['left', 'right'\]: say which with video_column"):
        open_videos("owner/two")


def test_unreachable_hub_id(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(ValueError, match="neither a local folder, nor .tar files, nor a Hub data set id .*reach"):
        open_videos("owner/name")


def test_what_the_library_cannot_read_is_named(monkeypatch, tmp_path):
    def load(*args, **kwargs):
        try:
            raise UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")
        except ValueError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(ValueError, match="video data 'owner/name' cannot be read by `datasets`: 'utf-8' codec"):
        open_videos("owner/name")


def test_hub_captions_may_be_lists(hub, clip):
    table = datasets.Dataset.from_dict({"video": [{"bytes": clip, "path": None}], "caption": [["a", "b"]]})
    hub["owner/lists"] = table.cast_column("video", datasets.Video(decode=False))
    dataset = open_videos("owner/lists")
    assert {dataset[i]["caption"] for i in range(12)} == {"a", "b"}


def test_folders_that_do_not_fit(tmp_path, clip):
    with pytest.raises(ValueError, match="neither a local folder, nor .tar files, nor a Hub data set id"):
        open_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"No \.tar file matches"):
        open_videos(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match=r"holds no video files \(\.mp4"):
        open_videos(tmp_path)
    (tmp_path / "a.mp4").write_bytes(clip)
    with pytest.raises(ValueError, match="no captions: add a metadata.csv or metadata.jsonl"):
        open_videos(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.mp4,7\n")
    with pytest.raises(ValueError, match=r"No caption column found .*its columns are \['file_name', 'label'\]"):
        open_videos(tmp_path)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_image_folder(tmp_path, with_metadata):
    for k, suffix in enumerate(("png", "jpg", "webp")):
        (tmp_path / f"{k}.{suffix}").write_bytes(image_bytes(50 * k, suffix))
    if with_metadata:
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,zero\n1.jpg,one\n2.webp,two\n")
    dataset = ImageDataset(tmp_path, size=8)
    assert captions(dataset) == (["one", "two", "zero"] if with_metadata else ["", "", ""])
    levels = sorted(round(float((dataset[i]["pixels"].mean() + 1) * 127.5)) for i in range(3))
    assert levels == pytest.approx([0, 50, 100], abs=2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("with_json", [True, False])
def test_image_tars(tmp_path, suffix, with_json):
    files = {}
    for k in range(3):
        files[f"{k}.{suffix}"] = image_bytes(40 * k, suffix)
        if with_json:
            files[f"{k}.json"] = {"caption": f"c{k}"}
    write_tar(tmp_path / "images.tar", files)
    dataset = ImageDataset(tmp_path, size=(8, 12))
    assert dataset[0]["pixels"].shape == (3, 8, 12)
    assert captions(dataset) == (["c0", "c1", "c2"] if with_json else ["", "", ""])


def test_hub_images(hub):
    table = datasets.Dataset.from_dict({"image": [{"bytes": image_bytes(9), "path": None}]})
    hub["owner/images"] = table.cast_column("image", datasets.Image(decode=False))
    assert ImageDataset("owner/images", size=8)[0]["caption"] == ""


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of `datasets` has no column of json")
def test_a_key_that_only_a_late_row_has_is_seen(tmp_path):
    values = [{"id": "7"}] * 250
    values[230] = {"caption": "a dog"}
    table = datasets.Dataset.from_dict({"json": values}, features=datasets.Features({"json": datasets.Json()}))
    for asked in (None, "caption", "json.caption"):
        request = DataRequest("x", VIDEOS, caption_column=asked)
        assert _find_caption(_values(table, asked), request) == ("json", "caption")
