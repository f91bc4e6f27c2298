"""The command: what it prints, what it refuses, and that two processes find what one does."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from diffusers_mcm.cli import main
from diffusers_mcm.commands.evaluate import named_folders
from tests.evaluation.conftest import CAPTIONS, samples, videomae, world, write_samples  # noqa: F401


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


def test_nothing_stray_is_on_stderr_beside_a_table(world, tmp_path, capsys):  # noqa: F811
    command = ["evaluate", str(world), "--reference", str(world), "--metrics", "motion", "--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "results")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_flags_of_the_images(samples, world, tmp_path, capsys):  # noqa: F811
    for split, count in (("train", 3), ("test", 8)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (30 * number, 9, 9)).save(tmp_path / "images" / split / f"{number}.png")
    command = ["evaluate", str(samples / "mcm4"), "--reference", str(world), "--metrics", "fid", "--num_frames", "3"]
    command += ["--frame_network", "dinov2=mcm-shapes-features", "--device", "cpu"]
    (tmp_path / "images" / "train" / "metadata.csv").write_text("picture,look\n0.png,1.png\n1.png,2.png\n")
    command += ["--images", str(tmp_path / "images"), "--image_split"]
    for flags, count in (["test"], 8), (["test", "--num_images", "5"], 5), (["train", "--image_column", "look"], 2):
        assert main([*command, *flags, "-o", str(tmp_path / f"results{count}")]) == 0
        found = json.loads((tmp_path / f"results{count}" / "evaluation.json").read_text())
        assert found["protocol"]["images"]["num_videos"] == count
    capsys.readouterr()
    for flags, message in (
        (["dev"], "has no subfolder 'dev' for that split"),
        (["test", "--num_images", "9"], "holds 8 images that can be used, fewer than 9"),
        (["train"], "Call it file_name, or name it with image_column (--image_column)"),
    ):
        assert main([*command, *flags, "-o", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err


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
        (["a", "b/a", "-o", "results"], "got 'a' for b/a: write NAME=b/a"),
        (["missing", "-o", "results"], "expected a folder of videos, got 'missing', which is not there"),
        (["..=a", "-o", "results"], "of letters, digits and common signs, got '..'"),
        (["a|b=a", "-o", "results"], "of letters, digits and common signs, got 'a|b'"),
        (["b/a", "-o", "results", "--num_images", "3"], "expected images with --num_images and the other flags"),
        (["b/a", "-o", "results", "--image_column", "x"], "got none: give --images"),
        (["b/a", "-o", "results", "--images", "x", "--num_images", "1"], "--num_images of at least 2, got 1"),
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


def test_two_processes_find_what_one_does(flags, tmp_path, samples):  # noqa: F811
    write_samples(tmp_path / "many", captions=CAPTIONS * 6, seeds=range(36))  # three shards
    command = ["-m", "diffusers_mcm", "evaluate", str(tmp_path / "many"), *flags]
    subprocess.run([sys.executable, *command, "-o", str(tmp_path / "one")], check=True, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    run = subprocess.run(
        [*launch, str(script), *command[2:], "-o", str(tmp_path / "two")], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(path.read_text() for path in tmp_path.glob("computed-*")) == ["1", "2"]
    assert run.stdout.count("evaluation.md") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one == two


# Says how many shards of the samples each process has computed. The first one scores when the other has ended.
LAUNCHED = """
import os, sys, time
from importlib import import_module
from pathlib import Path
from diffusers_mcm.cli import main
from diffusers_mcm.evaluation import measuring

evaluation = import_module("diffusers_mcm.evaluation.evaluate")
scored = evaluation._scored

def scored_alone(*given):
    for _ in range(600):
        if Path(sys.argv[-1]).with_name("computed-1").exists():
            return scored(*given)
        time.sleep(0.1)
    raise TimeoutError("the other process waits for the scores")

evaluation._scored = scored_alone

computed, real = [], measuring._measure_shard
measuring._measure_shard = lambda shard, *rest: (computed.append(shard[0].name), real(shard, *rest))
status = main(sys.argv[1:])
folder = Path(sys.argv[-1]).parent
(folder / f"computed-{os.environ['RANK']}").write_text(str(sum("many" in name for name in computed)))
sys.exit(status)
"""
