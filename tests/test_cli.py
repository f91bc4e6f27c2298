import os
import subprocess
import sys

import pytest

from diffusers_mcm.cli import COMMANDS, SHAPES_COMMANDS, main


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["shapes", name] for name in SHAPES_COMMANDS])
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert f"usage: diffusers-mcm {' '.join(command)}" in capsys.readouterr().out


def test_python_m_runs_the_command():
    run = subprocess.run([sys.executable, "-m", "diffusers_mcm", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in run.stdout and "shapes" in run.stdout


REFUSED = [
    ["generate", "--help"],
    ["generate"],
    ["generate", "a ring", "--stepz", "4"],
    ["generate", "a ring", "--fps", "0"],
    ["generate", "a ring", "-o", "out.avi"],
    ["push", "folder", "no/such/name"],
    ["push", "--help"],
    ["convert", "lora", "there", "--to", "nothing"],
    ["info"],
    ["shapes", "build", "--help"],
    ["--help"],
    [],
]


def test_help_and_mistakes_are_told_at_once():
    """Without the seconds that torch, diffusers and transformers take to import."""
    code = f"""
import sys
from diffusers_mcm.cli import main
for arguments in {REFUSED!r}:
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    heavy = {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    print("told:", code, heavy or "light")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [line for line in run.stdout.splitlines() if line.startswith("told:")]
    helped = ["--help" in arguments for arguments in REFUSED]
    assert told == [f"told: {0 if right else 2} light" for right in helped], run.stdout + run.stderr


def test_a_prompt_that_the_encoding_of_the_output_lacks_is_printed_all_the_same():
    code = """
from diffusers_mcm.commands import info
info.main = lambda rest: print("a corgi, 柯基犬")
from diffusers_mcm.cli import main
raise SystemExit(main(["info"]))
"""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (0, "a corgi, \\u67ef\\u57fa\\u72ac\n"), run.stderr


def test_output_that_cannot_be_written_is_an_error(monkeypatch, capsys):
    """Where stdout goes to a disk that is full, which this device is."""
    monkeypatch.setattr("diffusers_mcm.commands.info.main", lambda rest: print("what is in the LoRA"))
    full = open("/dev/full", "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["info", "lora"]) == 2
    with pytest.raises(OSError, match="No space left"):
        full.close()  # what could not be written is still there
    assert "diffusers-mcm: error: [Errno 28] No space left on device" in capsys.readouterr().err
