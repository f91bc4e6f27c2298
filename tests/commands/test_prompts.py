import io
from pathlib import Path

import pytest

from diffusers_mcm.commands.prompts import Job, Prompt, numbered, plan, read_list, read_prompts, slug, vbench_names
from diffusers_mcm.files import atomic_file
from diffusers_mcm.text_files import _told


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_text_file_has_a_prompt_a_line(file):
    text = "\ufeffa corgi\n\n  # not this one\n  a cat, running  \n„ein Hund“\n"
    assert read_list(file("list.txt", text)) == [Prompt("a corgi"), Prompt("a cat, running"), Prompt("„ein Hund“")]


def test_csv_and_jsonl_say_the_same(file):
    expected = [Prompt("a corgi, wet", "blurry", 7), Prompt("a cat")]
    table = file("list.csv", 'prompt,negative_prompt,seed\n"a corgi, wet",blurry,7\na cat,,\n')
    objects = (
        '{"prompt": "a corgi, wet", "negative_prompt": "blurry", "seed": 7}\n\n{"prompt": "a cat", "seed": null}\n'
    )
    assert read_list(table) == expected
    assert read_list(file("list.jsonl", objects)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n  "a corgi, wet",\n  "a cat"\n]\n', [Prompt("a corgi, wet"), Prompt("a cat")]),
        ('[{"prompt": "a", "negative_prompt": "b", "seed": 1}, "c"]', [Prompt("a", "b", 1), Prompt("c")]),
        ('{"prompts": ["a", {"prompt": "b", "seed": null}]}', [Prompt("a"), Prompt("b")]),
        ('{"prompt": "a",\n "seed": 3}', [Prompt("a", seed=3)]),
    ],
)
@pytest.mark.parametrize("name", ["list.json", "LIST.JSON", "list.txt", "-"])
def test_json_is_read_as_json_wherever_it_stands(file, monkeypatch, text, expected, name):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_list(name if name == "-" else file(name, "\ufeff" + text)) == expected


def test_json_lines_under_another_name(file):
    text = '{"prompt": "a"}\n{"prompt": "b"}\n'
    assert read_list(file("list.txt", text)) == [Prompt("a"), Prompt("b")]
    with pytest.raises(ValueError, match=r"expected a JSON object in .*list\.txt, line 2, got 'oops'"):
        read_list(file("list.txt", '{"prompt": "a"}\noops\n'))


def test_brackets_alone_are_no_json(file):
    assert read_list(file("list.txt", "[wide shot] a corgi\n{a|b} cat\n")) == [
        Prompt("[wide shot] a corgi"), Prompt("{a|b} cat"),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "un café\r\n"),
        ("l.csv", "Prompt;Seed\r\nun café;\r\n"),
        ("l.tsv", "prompt\tseed\nun café\t\n"),
        ("l.json", '["un café"]'),
        ("l.jsonl", '{"prompt": "un café"}'),
    ],
)
def test_any_encoding_and_separator(tmp_path, monkeypatch, encoding, name, text):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_list(str(tmp_path / name)) == [Prompt("un café")]
    if name == "l.txt":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode(encoding)), encoding="ascii"))
        assert read_list("-") == [Prompt("un café")]


def test_bytes_that_are_no_known_text_are_told_by_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a dog\nсобака бежит\n".encode("cp1251"))
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected text in UTF-8.*Save the file as UTF-8"):
        read_list(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("as_file", [False, True])
def test_stdin(monkeypatch, as_file):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts([] if as_file else ["-"], "-" if as_file else None) == [Prompt("one"), Prompt("two")]


def test_processes_that_share_a_list_cannot_share_stdin(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with pytest.raises(
        ValueError, match="expected the prompts in a file: of several processes each would read a part"
    ):
        read_prompts([], "-")


def test_a_prompt_may_hold_what_separates_lines_elsewhere(file):
    assert read_list(file("list.jsonl", '{"prompt": "one\u2028two"}\r\n')) == [Prompt("one\u2028two")]
    assert read_list(file("list.csv", 'prompt\n"one\ntwo"\nthree\n')) == [Prompt("one\ntwo"), Prompt("three")]


def test_arguments_come_before_the_file(file):
    assert [p.prompt for p in read_prompts(["first"], file("list", "second\n"))] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "# nothing\n", r"at least one prompt in .*list.txt, got none"),
        ("list.jsonl", '{"prompt": "a"}\n{"prompt"\n', r"expected a JSON object in .*list.jsonl, line 2, got"),
        ("list.jsonl", '"a corgi"', r"expected `prompt` and perhaps negative_prompt and seed in .*prompt 1, got"),
        ("list.jsonl", '{"prompt": "a", "sede": 1}', "got {'prompt': 'a', 'sede': 1}"),
        ("list.json", '["a",\n "b",\n]', r"expected an array of prompts in .*list\.json, got something else: .*line"),
        ("list.txt", '["a",\n "b",\n]', r"expected an array of prompts in .*list\.txt, got something else: .*line"),
        ("list.json", "3", r"expected an array of prompts in .*list\.json, got 3"),
        ("list.json", '["a", 3]', r"expected `prompt` and perhaps .* in .*list\.json, prompt 2, got 3"),
        ("list.json", '["a", " "]', r"expected a text as the prompt in .*list\.json, prompt 2, got ' '"),
        ("list.json", "[]", r"at least one prompt in .*list\.json, got none"),
        ("list.json", '{"prompts": ["a"], "seed": 1}', r"expected `prompt` and perhaps .*list\.json, prompt 1"),
        ("list.csv", "prompt,seed\na cat, wet,1\n", r"list\.csv, line 2: it has 3 cells where the header has 2"),
        ("list.csv", 'prompt,seed\n"a cat,1\n', r"list\.csv, line 2: its quotes do not match"),
        ("list.csv", "text\na corgi\n", "expected `prompt` .* got {'text': 'a corgi'}"),
        ("list.csv", "prompt,seed\na,x\n", "expected a whole number as the seed in .*prompt 1, got 'x'"),
        ("list.jsonl", '{"prompt": "a", "seed": 1.5}', "expected a whole number as the seed .* got 1.5"),
        ("list.jsonl", '{"prompt": " "}', "expected a text as the prompt in .* got ' '"),
        ("list.jsonl", '{"prompt": "a", "negative_prompt": 3}', "expected a text as the negative_prompt .* got 3"),
    ],
)
def test_bad_lists_are_told_by_line(file, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_list(file(name, text))


def test_no_prompt_at_all():
    with pytest.raises(ValueError, match="expected a prompt: as an argument, in a file .* or from stdin"):
        read_prompts([], None)


def test_a_prompts_own_seed_and_negative_prompt_win():
    jobs = plan([Prompt("a", "dull", 5), Prompt("b")], Path("v.mp4"), None, seed=1, negative_prompt="bad")
    assert jobs == [Job("a", "dull", 5, Path("v-1.mp4")), Job("b", "bad", 1, Path("v-2.mp4"))]


def test_videos_of_one_prompt_count_their_seeds_up():
    jobs = plan([Prompt("A cat!"), Prompt("b", seed=9)], Path("d"), ".gif", seed=3, num_videos=2)
    assert [(job.seed, str(job.path)) for job in jobs] == [
        (3, "d/0001-a-cat-1.gif"),
        (4, "d/0001-a-cat-2.gif"),
        (9, "d/0002-b-1.gif"),
        (10, "d/0002-b-2.gif"),
    ]
    jobs = plan([Prompt("a")] * 2, Path("."), ".gif", seed=3)
    assert [str(job.path) for job in jobs] == ["0001-a.gif", "0002-a.gif"]


def test_vbench_names_videos_by_their_prompts():
    options = dict(seed=3, num_videos=2, layout="vbench")
    jobs = plan([Prompt("A cat, (wet)"), Prompt("Ein Hund „bellt“", seed=9)], Path("d"), ".mp4", **options)
    assert [(job.seed, str(job.path)) for job in jobs] == [
        (3, "d/A cat, (wet)-0.mp4"),
        (4, "d/A cat, (wet)-1.mp4"),
        (9, "d/Ein Hund „bellt“-0.mp4"),
        (10, "d/Ein Hund „bellt“-1.mp4"),
    ]


def test_vbench_counts_on_where_a_prompt_comes_again():
    """As in the lists of `evaluate --write_prompts`, in which every video has a seed of its own."""
    prompts = [Prompt("a cat", seed=5), Prompt("a dog", seed=6), Prompt("a cat", seed=7), Prompt("a cat", seed=8)]
    jobs = plan(prompts, Path("d"), ".mp4", seed=0, layout="vbench")
    assert [(job.seed, job.path.name) for job in jobs] == [
        (5, "a cat-0.mp4"),
        (6, "a dog-0.mp4"),
        (7, "a cat-1.mp4"),
        (8, "a cat-2.mp4"),
    ]
    assert vbench_names(["a", "b", "a"], 2) == ["a-0", "a-1", "b-0", "b-1", "a-2", "a-3"]


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["a", "input/output"], "files can be called by, for --layout vbench; 'input/output': it holds a '/'"),
        (["."], r"vbench; '\.': it begins with a dot"),
        (["a\nb"], r"vbench; 'a\\nb': it holds characters that are not printed"),
        (["é" * 110], "it is 222 bytes long with its number, and a name has 220 at most"),
    ],
)
def test_prompts_that_no_file_can_be_called_by(prompts, message):
    with pytest.raises(ValueError, match=message):
        vbench_names(prompts, 1)


def test_the_longest_name_can_be_written(tmp_path):
    """Beside what a file is called until it is whole; VBench's longest prompt has 210 characters."""
    (name,) = vbench_names(["a" * 218], 1)
    with atomic_file(tmp_path / f"{name}.mp4") as temporary:
        temporary.write_bytes(b"video")
    assert (tmp_path / f"{name}.mp4").is_file()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_have_a_range(seed):
    with pytest.raises(ValueError, match=rf"seeds from 0 to 2\^63 - 1, got {seed}"):
        plan([Prompt("a")], Path("v.mp4"), None, seed=seed)


def test_numbers_sort_as_text():
    assert numbered(Path("d/v.mp4"), 1) == [Path("d/v.mp4")]
    assert [path.name for path in numbered(Path("v.mp4"), 10)][::9] == ["v-01.mp4", "v-10.mp4"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, moving left", "a-red-circle-moving-left"),
        ("../../etc/passwd", "etc-passwd"),
        ("一只柯基犬 on the beach", "一只柯基犬-on-the-beach"),
        ("?!", "video"),
        ("x" * 39 + " y and more", "x" * 39),
    ],
)
def test_slugs_are_file_names(prompt, expected):
    assert slug(prompt) == expected


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_guessed_encoding_is_told(tmp_path, monkeypatch, caplog, name):
    _told.clear()  # each file's is told once
    data = "prompt\na café\n".encode("cp1252")
    (tmp_path / name).write_bytes(data)
    read_list(str(tmp_path / name))
    assert f"{tmp_path / name} is not in UTF-8 and is read as Windows-1252. If line 2 should" in caplog.text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    read_list("-")
    assert "stdin is not in UTF-8 and is read as Windows-1252" in caplog.text
