"""The rows of a data set: their order, their captions and their names, whatever they were opened from."""

import datasets
import pyarrow as pa
import pytest

from diffusers_mcm.data.columns import IMAGES, VIDEOS, DataRequest
from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.rows import HubRows, MediaRows
from diffusers_mcm.data.sources import open_rows

from .conftest import captions, write_tar


def test_order_of_rows_depends_on_the_files_only(tmp_path):
    for part in ("y", "x"):
        (tmp_path / part).mkdir()
        for name in ("2.mp4", "1.mp4"):
            (tmp_path / part / name).touch()
        (tmp_path / part / "metadata.csv").write_text(f"file_name,text\n2.mp4,{part}2\n1.mp4,{part}1\n")
    rows = open_rows(tmp_path, VIDEOS)
    assert captions(rows) == ["x1", "x2", "y1", "y2"]


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_the_order_is_told_by_the_files_and_not_by_where_they_lie(tmp_path, kind):
    def build(place, names):
        (tmp_path / place).mkdir()
        if kind == "tars":
            write_tar(tmp_path / place / "0.tar", {f"{name}.png": b"" for name in names})
        for name in names if kind == "folder" else ():
            (tmp_path / place / f"{name}.png").touch()
        return open_rows(tmp_path / place, IMAGES).order()

    assert build("x", "abc") == build("y", "abc")
    assert build("z", "abd") != build("w", "ab") != build("v", "abc")


def hub_rows(kind, rows, column):
    table = datasets.Dataset.from_list([{"file": {"path": f"{i}.mp4", "bytes": b""}, **row} for i, row in rows])
    return HubRows(DataRequest("owner/name", kind), table, "file", (column,))


def test_of_several_captions_one_is_chosen_and_none_is_refused_where_it_is_needed():
    values = [["a", "b"], ["c"], []]
    rows = hub_rows(VIDEOS, list(enumerate({"text": value} for value in values)), "text")
    assert [rows.caption(rows[0], uniform) for uniform in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
    with pytest.raises(UnusableItem, match="it has no caption"):
        rows.caption(rows[2])
    assert rows.order() is None  # a table of the library does not tell its order


def test_all_captions_are_those_of_the_rows_less_the_refused_ones():
    values = [["a"], [], ["b"]]
    videos = hub_rows(VIDEOS, list(enumerate({"text": value} for value in values)), "text")
    assert list(videos.all_captions()) == ["a", "b"]
    other = hub_rows(VIDEOS, list(enumerate({"text": value} for value in [["a"], [], ["c"]])), "text")
    assert videos.content() != other.content() is not None
    images = hub_rows(IMAGES, list(enumerate({"text": value} for value in values)), "text")
    assert list(images.all_captions()) == ["a", "", "b"]


def test_a_caption_that_is_no_text_is_refused():
    rows = hub_rows(VIDEOS, list(enumerate([{"text": {"en": "a"}}])), "text")
    with pytest.raises(UnusableItem, match="its caption is neither a text nor a list of texts"):
        rows.caption(rows[0])
    assert list(rows.all_captions()) == []


def test_a_row_is_named_by_its_file_within_its_tar():
    table = datasets.Dataset.from_list(
        [
            {"file": {"path": "x/1.mp4", "bytes": b""}, "__key__": "k", "__url__": "hf://a/0.tar"},
            {"file": {"path": None, "bytes": b""}, "__key__": "k", "__url__": None},
            {"file": {"path": None, "bytes": b""}, "__key__": None, "__url__": None},
        ]
    )
    rows = HubRows(DataRequest("owner/name", IMAGES), table, "file", None)
    assert [rows.name(row, rows[row]) for row in range(3)] == ["0.tar/x/1.mp4", "k", "row 2"]
    assert captions(rows) == ["", "", ""]


def test_what_is_in_the_rows_is_told_by_captions_and_sizes(tmp_path):
    """Of a folder; of tars by the sizes of their files. Names and places do not matter."""
    contents = {}
    for name, caption, data in (("a", "one", b"12"), ("b", "one", b"12"), ("c", "two", b"12"), ("d", "one", b"123")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0.png").write_bytes(data)
        (folder / "metadata.csv").write_text(f"file_name,caption\n0.png,{caption}\n")
        write_tar(tmp_path / f"{name}.tar", {"0.png": data, "0.txt": caption})
        kinds = (open_rows(folder, IMAGES), open_rows(tmp_path / f"{name}.tar", IMAGES))
        contents[name] = [rows.content() for rows in kinds]
    assert contents["a"] == contents["b"] and None not in contents["a"]
    assert contents["c"][0] != contents["a"][0] != contents["d"][0] and contents["d"][1] != contents["a"][1]


def test_all_texts_are_all_that_may_be_drawn():
    class Listed(MediaRows):
        def captions(self, item):
            return item["texts"]

    table = pa.table({"texts": [["a", "b"], [], ["c"], None]})
    videos, images = (Listed(DataRequest("here", kind), table) for kind in (VIDEOS, IMAGES))
    assert list(videos.all_texts()) == ["a", "b", "c"] and list(images.all_texts()) == ["a", "b", "", "c", ""]
