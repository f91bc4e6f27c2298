import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_base

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny random base model whose videos, 4 frames of 32 x 32, are large enough for the oracle."""
    folder = save_tiny_base(tmp_path_factory.mktemp("base"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"height": 32, "width": 32, "num_frames": 4}))
    return str(folder)


@pytest.fixture
def run(monkeypatch):
    """Run a script as `python examples/shapes/NAME.py FLAGS` does."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(name: str, **flags) -> None:
        words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return call
