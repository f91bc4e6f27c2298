import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from diffusers_mcm.cli import SHAPES_COMMANDS, main
from diffusers_mcm.commands.generate import numbered
from tests.tiny import NUM_FRAMES, SIZE, save_tiny_base

PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


def generate(model, *arguments, size=SIZE):
    sizes = ["--frames", str(NUM_FRAMES), "--height", str(size), "--width", str(size)]
    return main(["generate", "--model", model, *sizes, "--steps", "1", "--device", "cpu", *map(str, arguments)])


def test_generate_writes_an_mp4_that_the_seed_decides(model, tmp_path):
    for name, seed in (("a.mp4", 1), ("b.mp4", 1), ("c.mp4", 2)):
        assert generate(model, PROMPT, "-o", tmp_path / name, "--seed", seed, "--fps", 4) == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
        assert [(f.height, f.width) for f in container.decode(video=0)] == [(SIZE, SIZE)] * NUM_FRAMES
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert first == again != other


def test_several_prompts_give_numbered_files(model, tmp_path, capsys):
    assert generate(model, PROMPT, "a blue ring", "-o", tmp_path / "out.gif", "--seed", 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.gif", "out-2.gif"]
    with Image.open(tmp_path / "out-2.gif") as image:
        assert image.size == (SIZE, SIZE)
    assert f"({NUM_FRAMES} frames, seed 3): a blue ring" in capsys.readouterr().out


def test_guidance_and_negative_prompt_reach_the_pipeline(model, tmp_path):
    for name, options in (("a.png", []), ("b.png", ["--guidance_scale", 4]), ("c.png", ["--guidance_scale", 4])):
        negative = ["--negative_prompt", "yellow"] if name == "c.png" else []
        assert generate(model, PROMPT, "-o", tmp_path / name, "--seed", 1, *options, *negative) == 0
    assert len({(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")}) == 3


def test_numbers_sort_as_text():
    assert numbered(Path("d/v.mp4"), 1) == [Path("d/v.mp4")]
    assert [path.name for path in numbered(Path("v.mp4"), 10)][::9] == ["v-01.mp4", "v-10.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.avi"], "ending in .mp4, .gif, .png, got 'out.avi'"),
        (["--fps", "0"], "expected --fps above 0, got 0"),
        (["--device", "abacus"], "expected a device out of .*cpu.* got 'abacus'"),
        (["--steps", "51"], "51"),
        (["--frames", "0"], "num_frames"),
        (["--height", "7"], "height"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert generate(model, PROMPT, *arguments) == 2
    error = capsys.readouterr().err
    assert "diffusers-mcm: error: " in error and "Traceback" not in error
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", PROMPT, "--stepz", "4"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err


@pytest.mark.parametrize("command", SHAPES_COMMANDS)
def test_every_shapes_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["shapes", command, "--help"])
    assert f"usage: diffusers-mcm shapes {command}" in capsys.readouterr().out


def test_python_m_runs_the_command():
    run = subprocess.run([sys.executable, "-m", "diffusers_mcm", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in run.stdout and "shapes" in run.stdout
