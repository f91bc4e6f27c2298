"""Metadata as people have it: each row is read, or skipped and counted, or the message names file, row and way out."""

import errno
import io
import json
import logging
import os
import unicodedata

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffusers_mcm.data import VideoDataset
from diffusers_mcm.data.folders import walk
from diffusers_mcm.data.sources import IMAGES, VIDEOS, open_rows

from .conftest import captions


@pytest.fixture
def folder(tmp_path):
    """Empty files a.mp4 to d.mp4: nothing is decoded here."""
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def write(folder, text, name="metadata.csv", encoding="utf-8"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return folder


def skipped(rows):
    """The last part of the name of each skipped item, and the reason."""
    return {os.path.basename(name): reason for name, reason in rows.skipped.items()}


@pytest.mark.parametrize(
    "header", ["file_name,text", "File_Name,Text", "video,caption", "path,prompt", "Video Path,TEXT"]
)
@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_headers_separators_and_encodings(folder, header, delimiter, encoding):
    text = f"{header}\na.mp4,un café\n".replace(",", delimiter)
    assert captions(open_rows(write(folder, text, encoding=encoding), VIDEOS)) == ["un café"]


def test_another_encoding_than_utf8_is_warned_of(folder, caplog):
    open_rows(write(folder, "file_name,text\na.mp4,un café\n", encoding="latin-1"), VIDEOS)
    assert "metadata.csv is not in UTF-8" in caplog.text
    assert "line 2 should not read 'a.mp4,un café'" in caplog.text


def test_captions_that_look_like_something_else_stay_text(folder):
    texts = ["007", "1e5", "NaN", "null", "True", "2024-01-01"]
    rows = open_rows(write(folder, "file_name,text\na.mp4,\n" + "".join(f"b.mp4,{t}\n" for t in texts)), VIDEOS)
    assert captions(rows) == texts
    assert skipped(rows) == {"a.mp4": "it has no caption"}


def test_rows_of_no_use_are_skipped_counted_and_warned_of(folder, caplog):
    text = 'file_name,text\na.mp4,ok\nb.mp4,a dog, running\nnone.mp4,x\nnone.mp4,y\nc.mp4,"open\n,z\nd.mp4,ok\n'
    rows = open_rows(write(folder, text), VIDEOS)
    assert captions(rows) == ["ok", "ok"]
    assert [*skipped(rows)] == [
        "metadata.csv, line 3", "none.mp4", "metadata.csv, line 5", "metadata.csv, line 6", "metadata.csv, line 7",
    ]  # fmt: skip
    reasons = list(skipped(rows).values())
    assert "3 cells where the header has 2" in reasons[0]
    assert "No such file" in reasons[1] and "metadata.csv, line 4 names it" in reasons[1]
    assert "quotes do not match" in reasons[3]
    assert reasons[4] == "it names no file"
    assert "5 are skipped, 2 are left" in caplog.text
    told = "2 of the 4 video files are not used, for no row of the metadata names them: b.mp4, c.mp4"  # are not read
    assert rows.unnamed == told and f"{folder}: {told}" in caplog.text


def test_a_file_that_a_row_names_by_its_whole_path_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    write(folder, f"file_name,text\n{folder}/a.mp4,one\n./b.mp4,two\n{folder}/../{folder.name}/c.mp4,three\n")
    rows = open_rows(folder.name, VIDEOS)
    assert captions(rows) == ["one", "three", "two"]
    assert rows.unnamed.endswith("1 of the 4 video files are not used, for no row of the metadata names them: d.mp4")


def test_a_file_that_a_row_names_by_another_way_to_it_is_named(folder):
    (folder.parent / "link").symlink_to(folder)
    write(folder, f"file_name,text\n../{folder.name}/a.mp4,one\n../link/b.mp4,two\nc.mp4,three\n")
    rows = open_rows(folder, VIDEOS)
    assert sorted(captions(rows)) == ["one", "three", "two"]
    assert rows.unnamed.endswith("1 of the 4 video files are not used, for no row of the metadata names them: d.mp4")


@pytest.fixture
def silent():
    """Nothing is logged: what is no text cannot be handed on between pytest's processes."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", ["a\\u0000b.mp4", "\\ud800.mp4"], ids=["zero", "half a pair"])
def test_a_name_that_no_file_can_have_is_skipped(folder, name, silent):
    write(folder, f'{{"file_name": "a.mp4", "text": "x"}}\n{{"file_name": "{name}", "text": "y"}}\n', "metadata.jsonl")
    rows = open_rows(folder, VIDEOS)
    assert captions(rows) == ["x"] and len(rows.skipped) == 1 and rows.unnamed.startswith("3 of the 4 video files")


@pytest.mark.parametrize("row", [".", "../{}"])
def test_a_row_that_names_the_folder_itself_hides_no_files(folder, row):
    write(folder, f"file_name,text\na.mp4,x\n{row.format(folder.name)},y\n")
    assert open_rows(folder, VIDEOS).unnamed.startswith("3 of the 4 video files are not used")


def test_settings_beside_a_table_are_none(folder):
    write(folder, "file_name,text\na.mp4,one\n")
    write(folder, json.dumps({"video": {"fps": 8}, "seed": 3}), "metadata.json")
    assert captions(open_rows(folder, VIDEOS)) == ["one"]
    write(folder, json.dumps({"video": "a.mp4", "text": "two"}), "metadata.json")
    with pytest.raises(ValueError, match="holds metadata.csv and metadata.json: keep one of them"):
        open_rows(folder, VIDEOS)


def test_what_was_skipped_on_opening_is_among_what_the_data_set_skipped(folder, caplog):
    write(folder, "file_name,text\na.mp4,ok\nnone.mp4,x\n")
    dataset = VideoDataset(folder, num_frames=1, height=8, width=8)
    assert [os.path.basename(name) for name in dataset.skipped] == ["none.mp4"]
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="yields nothing"):
        dataset[0]


def test_jsonl_with_trouble(folder):
    lines = ['\ufeff{"file_name": "a.mp4", "text": "one"}', "{", "[1]", '{"file_name": "a.mp4", "text": null}']
    lines += ['{"file_name": "b.mp4", "text": true}', '{"file_name": "b.mp4", "text": 12}', '{"text": "x"}']
    lines += ['{"file_name": "c.mp4", "text": "half \\ud83d"}', '{"file_name": ["d.mp4"], "text": "x"}']
    rows = open_rows(write(folder, "\n".join(lines), "metadata.jsonl"), VIDEOS)
    assert captions(rows) == ["one", "12", "half ?"]
    assert skipped(rows) == {
        "metadata.jsonl, line 2": rows.skipped[f"{folder}/metadata.jsonl, line 2"],
        "metadata.jsonl, line 3": 'expected an object, got ["1"]',
        "a.mp4": "it has no caption",
        "b.mp4": "its caption is neither a text nor a list of texts",
        "metadata.jsonl, line 7": "it names no file",
        "metadata.jsonl, line 9": "expected a file name, got ['d.mp4']",
    }


def test_of_several_captions_each_is_drawn(folder):
    write(folder, json.dumps({"file_name": "a.mp4", "text": ["one", " ", "two"]}), "metadata.jsonl")
    rows = open_rows(folder, VIDEOS)
    assert [rows.caption(rows[0], uniform) for uniform in (0.0, 0.49, 0.5, 0.99)] == ["one", "one", "two", "two"]


def test_the_caption_drawn_depends_on_the_seed_and_the_index(tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip)
    write(tmp_path, json.dumps({"file_name": "a.mp4", "text": ["one", "two"]}), "metadata.jsonl")
    first, again, other = (VideoDataset(tmp_path, 2, 1, 8, 8, seed=seed) for seed in (0, 0, 1))
    drawn = [[dataset[i]["caption"] for i in range(12)] for dataset in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {"one", "two"}


@pytest.mark.parametrize("name", ["metadata.json", "metadata.jsonl"])
def test_json_array(folder, name):
    rows = open_rows(write(folder, '[{"file_name": "a.mp4", "text": "x"},\n 3]', name), VIDEOS)
    assert captions(rows) == ["x"]
    assert skipped(rows) == {f"{name}, row 2": 'expected an object, got "3"'}


def test_parquet(folder):
    texts = pa.array(["007", None, "x"]).dictionary_encode()
    table = pa.table({"File_Name": ["a.mp4", "b.mp4", "c.mp4"], "text": texts, "blob": [b"\0"] * 3})
    pa.parquet.write_table(table, folder / "metadata.parquet")
    rows = open_rows(folder, VIDEOS)
    assert captions(rows) == ["007", "x"]
    assert skipped(rows) == {"b.mp4": "it has no caption"}
    rest = (folder / "metadata.parquet").read_bytes()[40:]
    write(folder, b"PAR1" + b"\xff" * 36 + rest, "metadata.parquet")
    with pytest.raises(ValueError, match=r"(?s)metadata\.parquet can be used.*row 1: from here on the table cannot"):
        open_rows(folder, VIDEOS)
    write(folder, b"PAR1", "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata\.parquet cannot be read as parquet"):
        open_rows(folder, VIDEOS)


def test_files_are_found_however_they_are_named(tmp_path):
    disk, data = tmp_path / "disk", tmp_path / "data"
    (disk / "deep").mkdir(parents=True)
    data.mkdir()
    for name in ("1.mp4", "deep/2.mp4", unicodedata.normalize("NFC", "é.mp4")):
        (disk / name).touch()
    (data / "clips").symlink_to(disk)
    (disk / "loop").symlink_to(data)
    (data / "3.mp4").symlink_to(disk / "1.mp4")
    names = ["clips/1.mp4", "clips\\deep\\2.mp4", "./3.mp4", str(disk / "1.mp4"), "../disk/1.mp4"]
    names.append("clips/" + unicodedata.normalize("NFD", "é.mp4"))
    write(data, "file_name|text\n" + "".join(f"{name}|{k}\n" for k, name in enumerate(names)))
    rows = open_rows(data, VIDEOS)
    assert not rows.skipped
    assert sorted(captions(rows)) == ["0", "1", "2", "3", "4", "5"]
    assert all(os.path.isfile(rows.media(rows[i])["path"]) for i in range(len(rows)))


def test_links_that_cannot_be_followed_are_files_of_no_use(folder, clip):
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "dead.mp4").symlink_to("nowhere.mp4")
    assert walk(str(folder)) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "dead.mp4", "self.mp4"]
    for name in "abcd":
        (folder / f"{name}.mp4").write_bytes(clip)
    write(folder, "file_name,text\n" + "".join(f"{name}.mp4,x\n" for name in ("a", "self", "dead")))
    dataset = VideoDataset(folder, num_frames=1, height=8, width=8)
    assert [dataset[index]["caption"] for index in range(3)] == ["x"] * 3
    assert skipped(dataset).keys() == {"self.mp4", "dead.mp4"}
    with pytest.raises(ValueError, match=r"no subfolder 'test' for that split; found \[\]"):
        open_rows(folder, VIDEOS, split="test")


@pytest.mark.parametrize("call", ["is_dir", "stat"])
def test_a_closed_folder_stops_nothing(folder, monkeypatch, caplog, call):
    """A link into it, and itself: these tests may run as somebody to whom nothing is closed."""
    (folder / "closed").mkdir()

    def closed(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self.entry = entry.name, entry.path, entry

        def is_dir(self):
            closed(self.path)
            return self.entry.is_dir()

    scandir, status = os.scandir, os.stat
    if call == "is_dir":
        monkeypatch.setattr(os, "scandir", lambda path: [Entry(entry) for entry in scandir(path)])
    else:
        monkeypatch.setattr(os, "stat", lambda path, **more: closed(path) or status(path, **more))
    media = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert walk(str(folder)) == (sorted([*media, "closed"]) if call == "is_dir" else media)
    assert ("closed is not read" in caplog.text) == (call == "stat")


def test_hidden_files_and_those_of_a_mac_are_no_images(tmp_path):
    for name in ("a.png", "._a.png", ".DS_Store", ".hidden/b.png", "__MACOSX/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()  # a name that is not UTF-8
    rows = open_rows(tmp_path, IMAGES)
    assert [rows.media(rows[i])["path"] for i in range(len(rows))] == [
        str(tmp_path / "a.png"), str(tmp_path / os.fsdecode(b"caf\xe9.png")),
    ]  # fmt: skip


def test_a_table_of_another_name_is_given_itself(folder):
    write(folder, "file_name,text\na.mp4,x\n", "captions.csv")
    assert captions(open_rows(folder / "captions.csv", VIDEOS)) == ["x"]
    with pytest.raises(ValueError, match=r"It holds captions\.csv: rename that, or give its path"):
        open_rows(folder, VIDEOS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metadata\.csv holds no rows\. Expected the columns file_name and caption"),
        ("file_name,text\n", r"metadata\.csv: there are columns but no rows"),
        ("a.mp4,a dog\nb.mp4,a cat\n", r"metadata\.csv has no header: its first line is \['a\.mp4', 'a dog'\]"),
        ("file_name,text,text\na.mp4,x,y\n", r"metadata\.csv has 2 columns named 'text': rename all but one"),
        (
            "file_name,text\nx.mp4,x\n",
            r"(?s)None of the 1 rows of .*metadata\.csv can.*x\.mp4: .*No such file",
        ),
        ("file_name,text\na.mp4,собака\n", r"(?s)metadata\.csv can be used.*line 2: .*save the table as UTF-8"),
    ],
)
def test_tables_of_no_use_are_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        open_rows(write(folder, text, encoding="cp1251"), VIDEOS)


def test_json_of_no_use_is_refused(folder):
    with pytest.raises(ValueError, match=r"metadata\.jsonl holds no rows; line 1: it is not JSON"):
        open_rows(write(folder, "hello\n", "metadata.jsonl"), VIDEOS)
    os.remove(folder / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.json is not valid JSON: .*line 2 column 2"):
        open_rows(write(folder, '[{"file_name": "a.mp4"},\n }]', "metadata.json"), VIDEOS)


def test_one_wrong_table_of_several_is_skipped(tmp_path):
    for part in ("p", "q"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.mp4").touch()
    write(tmp_path / "p", "file_name,text\na.mp4,x\n")
    write(tmp_path / "q", "foo,bar\n1,2\n")
    rows = open_rows(tmp_path, VIDEOS)
    assert captions(rows) == ["x"]
    assert "no column that names the video files" in rows.skipped[str(tmp_path / "q" / "metadata.csv")]
    write(tmp_path / "q", b"{}", "metadata.jsonl")
    with pytest.raises(ValueError, match=r"/q' holds metadata\.csv and metadata\.jsonl: keep one of them"):
        open_rows(tmp_path, VIDEOS)


def test_a_large_table_is_kept_in_columns(folder, monkeypatch):
    monkeypatch.setattr("diffusers_mcm.data.folders._CHUNK", 3)
    text = "file_name,text\n" + "".join(f"{'dcba'[k % 4]}.mp4,{k}\n" for k in range(8))
    rows = open_rows(write(folder, text), VIDEOS)
    assert captions(rows) == ["3", "7", "2", "6", "1", "5", "0", "4"]
    assert rows.table["file"].num_chunks == 1


def test_a_zip_is_left_to_the_library(tmp_path, clip):
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.mp4", clip)
        archive.writestr("metadata.csv", io.StringIO("file_name,text\na.mp4,zipped\n").getvalue())
    assert VideoDataset(tmp_path, 2, 1, 8, 8)[0]["caption"] == "zipped"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.json"])
@pytest.mark.parametrize("kind", [VIDEOS, IMAGES])
def test_a_caption_that_none_of_the_first_rows_has_is_found(tmp_path, name, kind):
    rows = [{"file_name": f"{i:03d}.{kind.name}"} for i in range(150)]
    rows[140]["caption"] = "a dog"
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    text = json.dumps(rows) if name == "metadata.json" else "\n".join(map(json.dumps, rows))
    opened = open_rows(write(tmp_path, text, name), kind)
    assert [caption for caption in opened.all_captions() if caption] == ["a dog"]


def test_what_further_columns_say_is_kept_with_the_row_that_was_found(folder):
    text = "file_name;caption;Frame Rate;seed\n.\\b.mp4;two;;8\na.mp4;one;12.5;7\n"
    rows = open_rows(write(folder, text), VIDEOS, extra_columns=("frame_rate", "seed", "steps"))
    said = [rows.said(rows[row]) for row in range(2)]
    assert said == [{"frame_rate": "12.5", "seed": "7"}, {"frame_rate": "", "seed": "8"}]
    plain = open_rows(folder, VIDEOS)
    assert captions(plain) == captions(rows) == ["one", "two"] and plain.said(plain[0]) == {}


def test_a_column_that_no_row_has_is_missed_with_all_there_are(tmp_path):
    rows = [{"file_name": "a.mp4"}] * 120 + [{"file_name": "a.mp4", "titel": "a dog"}]
    with pytest.raises(ValueError, match=r"No caption column found .*its columns are \['file_name', 'titel'\]"):
        open_rows(write(tmp_path, "\n".join(map(json.dumps, rows)), "metadata.jsonl"), VIDEOS)
