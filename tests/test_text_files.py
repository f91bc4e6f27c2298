"""Text in any encoding, and tables in any notation; what is wrong is told by line."""

import pytest

from diffusers_mcm.text_files import decode_text, find_name, parse_json, read_table, read_text

TEXT = "file_name,text\na.mp4,a café\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_usual_encoding_reads_the_same(encoding, end):
    if encoding in ("utf-16-le", "utf-16-be"):
        assert not TEXT.encode(encoding).startswith((b"\xff", b"\xfe"))  # these have no byte order mark
    decoded = decode_text(TEXT.replace("\n", end).encode(encoding))
    assert decoded.content == TEXT
    assert decoded.broken_lines == ()


def test_what_windows_adds_to_latin_1_is_read():
    assert decode_text("“a dog” – 5 €".encode("cp1252")).content == "“a dog” – 5 €"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("собака бежит", "cp1251"), ("一只柯基犬", "gbk"), ("犬が走る", "shift-jis"), ("ένας σκύλος", "cp1253")],
)
def test_other_encodings_are_not_guessed_at(tmp_path, text, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes(b"a dog\n" + text.encode(encoding) + b"\n")
    assert decode_text(path.read_bytes()).broken_lines == (2,)
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected text in UTF-8, UTF-16 or Windows-1252"):
        read_text(path)


def test_one_broken_line_does_not_turn_utf8_into_another_encoding():
    decoded = decode_text("a café\n".encode() + b"a caf\xe9\nok\n")
    assert decoded.encoding == "utf-8"
    assert decoded.broken_lines == (2,)
    assert decoded.content.split("\n")[::2] == ["a café", "ok"]


def test_one_broken_line_does_not_refuse_the_others():
    decoded = decode_text("un café\n".encode("cp1252") * 3 + b"caf\x81\n")
    assert decoded.encoding == "cp1252"
    assert decoded.broken_lines == (4,)
    assert decoded.content == "un café\n" * 3 + "caf\ufffd\n"


@pytest.mark.parametrize(
    ("written", "wanted"), [("File_Name", "file_name"), ("file name", "file_name"), ("FileName", "file_name")]
)
def test_columns_are_found_however_they_are_written(written, wanted):
    assert find_name(["x", written], wanted) == written
    assert find_name([written, wanted], wanted) == wanted  # exactly so if it is there
    assert find_name(["x"], wanted) is None


def rows(text, suffix=".csv", known=("file_name", "text")):
    return [(row.line, row.problem or row.values) for row in read_table(text, suffix, known).rows]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("says_so", [False, True])
def test_any_separator(delimiter, says_so):
    lines = ["sep=" + delimiter] * says_so + [f"file_name{delimiter}text", f"a.mp4{delimiter} x: y", ""]
    assert rows("\n".join(lines)) == [(2 + says_so, {"file_name": "a.mp4", "text": "x: y"})]


def test_a_cell_is_the_text_that_stands_there():
    cells = ["007", "1e5", "NaN", "null", "True", "2024-01-01", ""]
    got = rows("file_name,text\n" + "".join(f"a.mp4,{cell}\n" for cell in cells))
    assert [values["text"] for _, values in got] == cells


def test_quoted_cells_and_ragged_rows():
    text = 'file_name,text,,\na.mp4,"one,\ntwo ""quoted"""\n\nb.mp4\nc.mp4,x,,,\nd.mp4,x,y,z\n'
    got = rows(text)
    assert got[0] == (2, {"file_name": "a.mp4", "text": 'one,\ntwo "quoted"'})
    assert got[1] == (5, {"file_name": "b.mp4", "text": ""})
    assert got[2] == (6, {"file_name": "c.mp4", "text": "x"})
    assert got[3] == (7, "it has 4 cells where the header has 2; a text that holds ',' needs quotes")


def test_a_quote_that_is_not_closed_costs_its_own_row_only():
    got = rows('file_name,text\na.mp4,"a dog\nb.mp4,"a cat, b"\nc.mp4,"big" c\nd.mp4,"open\ne.mp4,e\n')
    assert [line for line, _ in got] == [2, 3, 4, 5, 6]
    assert [values["text"] for line, values in got if line in (3, 4, 6)] == ["a cat, b", '"big" c', "e"]
    assert all("its quotes do not match" in problem for line, problem in got if line in (2, 5))


def test_json_lines_with_trouble():
    text = '{"text": 7}\n{"text": 1e5}\n{"text"\n\n[1]\n{"text": NaN}\n'
    got = rows(text, ".jsonl")
    assert rows('{"text": "a\tb"}', ".jsonl") == [(1, {"text": "a\tb"})]  # not quite JSON, but clear
    assert [line for line, _ in got] == [1, 2, 3, 5, 6]
    assert [got[i][1] for i in (0, 1, 4)] == [{"text": "7"}, {"text": "1e5"}, {"text": None}]
    assert got[2][1].startswith("it is not JSON (")
    assert got[3][1].startswith("expected an object, got [")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_json_array_is_read_whole(suffix):
    table = read_table('[\n {"a": "x"},\n {"b": "y"}, 3\n]', suffix, ())
    assert table.columns == ["a", "b"]
    assert table.unit == "row"
    assert [(row.line, row.values) for row in table.rows] == [(1, {"a": "x"}), (2, {"b": "y"}), (3, {})]


def test_a_single_object_is_a_table_of_one_row():
    table = read_table('{\n "a": "x"\n}', ".json", ())
    assert [(row.line, row.values) for row in table.rows] == [(1, {"a": "x"})]


def test_json_lines_may_be_called_json():
    assert rows('{"a": "x"}\n{"a": "y"}\n', ".json") == [(1, {"a": "x"}), (2, {"a": "y"})]


def test_broken_json_is_told_by_place():
    with pytest.raises(ValueError, match="line 2 column 2"):
        read_table('[{"a": "x"},\n }]', ".json", ())
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_of_nothing_there_are_no_columns():
    assert read_table("\n\n", ".csv", ()).columns == []
    assert read_table("", ".jsonl", ()).columns == []


def test_a_guessed_encoding_is_told_once_with_the_file_and_a_line_to_tell_by(tmp_path, caplog):
    path = tmp_path / "list.txt"
    path.write_bytes("a dog\na café\n".encode("cp1252"))
    assert read_text(path) == read_text(path) == "a dog\na café\n"
    told = f"{path} is not in UTF-8 and is read as Windows-1252. If line 2 should not read 'a café', save it as UTF-8."
    assert [record.getMessage() for record in caplog.records] == [told]
    path.write_text("a café", encoding="utf-8")
    caplog.clear()
    read_text(path)
    assert not caplog.records
