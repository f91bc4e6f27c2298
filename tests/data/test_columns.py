"""Which column is taken for the files and which for the captions, and what counts as a caption."""

import pytest

from diffusers_mcm.data.columns import (
    IMAGES,
    VIDEOS,
    DataRequest,
    caption_texts,
    find_caption_column,
    find_file_column,
)
from diffusers_mcm.data.sources import open_rows

from .conftest import captions


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (" a dog\n", ["a dog"]),
        ("007", ["007"]),
        ("NaN", ["NaN"]),
        ("  ", []),
        (None, []),
        (["a", " ", "b "], ["a", "b"]),
        (("a",), ["a"]),
        ("half a \ud83d pair", ["half a ? pair"]),
        (7, None),
        (["a", 7], None),
        (b"a dog", None),
        ({"caption": "a dog"}, None),
    ],
)
def test_captions_are_texts_and_lists_of_them(value, texts):
    assert caption_texts(value) == texts


@pytest.mark.parametrize(
    ("columns", "files", "caption"),
    [
        (["video", "caption", "file_name", "text"], "file_name", "caption"),
        (["path", "prompt", "text", "video"], "video", "text"),
        (["image", "Clip Path", "description"], "Clip Path", "description"),
    ],
)
def test_the_first_known_name_counts_however_it_is_written(columns, files, caption):
    request = DataRequest("x", VIDEOS)
    assert find_file_column(columns, "x.csv", request) == files
    assert find_caption_column(columns, "x.csv", request) == caption


def test_a_column_asked_for_under_the_kinds_name_may_be_called_otherwise():
    request = DataRequest("x", VIDEOS, media_column="video")
    assert find_file_column(["file_name", "video"], "x.csv", request) == "video"
    assert find_file_column(["file_name", "text"], "x.csv", request) == "file_name"


def test_images_need_no_captions_unless_their_column_is_asked_for():
    assert find_caption_column(["image"], "x.csv", DataRequest("x", IMAGES)) is None
    with pytest.raises(ValueError, match=r"x\.csv has no caption column 'words' of text; its columns are \['image'\]"):
        find_caption_column(["image"], "x.csv", DataRequest("x", IMAGES, caption_column="words"))
    with pytest.raises(ValueError, match="2 columns named 'image': rename all but one"):
        find_file_column(["image", "image"], "x.csv", DataRequest("x", IMAGES))


def test_columns_can_be_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("clip;words\na.mp4;x\n")
    rows = open_rows(tmp_path, VIDEOS, media_column="clip", caption_column="words")
    assert captions(rows) == ["x"]
    with pytest.raises(ValueError, match=r"metadata\.csv has no video column 'nope'; its columns are \['clip'"):
        open_rows(tmp_path, VIDEOS, media_column="nope")
    with pytest.raises(ValueError, match=r"names the video files; its columns are \['clip', .* \(--video_column\)"):
        open_rows(tmp_path, VIDEOS)
    with pytest.raises(ValueError, match=r"No caption column found in .*metadata\.csv: .* \(--caption_column\)"):
        open_rows(tmp_path, VIDEOS, media_column="clip")
