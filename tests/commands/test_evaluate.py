"""The command: what it prints, what it refuses, and that two processes find what one does."""

import json
import subprocess
import sys

import pytest

from diffusers_mcm.cli import main
from diffusers_mcm.commands.evaluate import named_folders
from tests.evaluation.conftest import samples, videomae, world  # noqa: F401


@pytest.fixture
def flags(videomae, world):  # noqa: F811
    return [
        *("--reference", str(world), "--metrics", "fvd", "--num_frames", "8", "--resamples", "10"),
        *("--video_network", f"videomae={videomae}", "--device", "cpu"),
    ]


def test_it_prints_the_table_and_where_the_page_is(samples, flags, tmp_path, capsys):  # noqa: F811
    command = ["evaluate", str(samples / "mcm4"), f"still={samples / 'mcm1'}", *flags, "-o", str(tmp_path / "results")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| mcm4 | 4 | 6 |" in printed and "| still | 1 | 6 |" in printed and "evaluation.md" in printed


def test_prompts_are_written_for_generate(world, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "prompts.jsonl"
    assert main(["evaluate", "--reference", str(world), "--num_videos", "3", "--write_prompts", str(path)]) == 0
    assert f"{path}: 3 prompts" in capsys.readouterr().out
    assert [set(json.loads(line)) for line in path.read_text().splitlines()] == [{"prompt", "seed"}] * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected folders of videos and --output, or --write_prompts"),
        (["a"], "expected folders of videos and --output"),
        (["a", "--write_prompts", "p.jsonl"], "expected no folders with --write_prompts, got 'a'"),
        (["a", "-o", "results", "--size", "1", "2", "3"], "--size as one number, or height and width, got 1 2 3"),
        (["a", "b/a", "-o", "results"], "a name of its own for each folder, got 'a' for b/a: write NAME=b/a"),
        (["missing", "-o", "results"], "expected a folder of videos, got 'missing', which is not there"),
        (["a", "-o", "results", "--metrics", "lpips"], "expected metrics out of fvd"),
        (["a", "-o", "results", "--video_network", "i3d"], "give a file, i3d=FILE"),
    ],
)
def test_what_is_refused(arguments, message, world, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--reference", str(world), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_folder_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg=7").mkdir()
    assert named_folders(["cfg=7", "mcm=out/4"]) == {"cfg=7": "cfg=7", "mcm": "out/4"}


def test_two_processes_find_what_one_does(samples, flags, tmp_path):  # noqa: F811
    command = ["-m", "diffusers_mcm", "evaluate", str(samples / "mcm4"), *flags]
    subprocess.run([sys.executable, *command, "-o", str(tmp_path / "one")], check=True, capture_output=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *command, "-o", str(tmp_path / "two")]
    subprocess.run(launch, check=True, capture_output=True, timeout=500)
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one == two
