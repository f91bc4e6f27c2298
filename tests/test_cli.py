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
