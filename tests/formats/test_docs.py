"""docs/other_tools.md is run from top to bottom, on tiny models that a local Hub serves under the real names."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_mcm import MCMPipeline, MCMScheduler
from diffusers_mcm.cli import main
from diffusers_mcm.consistency import boundary_scalings
from tests.formats.world import sample
from tests.hub_server import hub_server

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/other_tools.md").read_text(encoding="utf-8"), re.DOTALL)


def run_blocks(blocks) -> dict:
    """Commands through the command line's own `main`, Python in one namespace, which is returned."""
    namespace = {}
    for language, text in blocks:
        if language == "bash":
            for line in text.strip().splitlines():
                program, *arguments = shlex.split(line)
                assert program == "diffusers-mcm" and main(arguments) == 0, line
        else:
            assert language == "python"
            exec(compile(text, "docs/other_tools.md", "exec"), namespace)
    return namespace


def test_every_block_runs(hub_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(ROOT / "examples/community", tmp_path / "examples/community")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) > 6
    with hub_server(hub_root):
        seen = run_blocks(BLOCKS)
        whole = MCMPipeline.from_pretrained("yhzhai/mcm", subfolder="animatediff-laion")
    assert "layout: peft" in capsys.readouterr().out
    with Image.open("stock.gif") as gif:
        assert gif.n_frames == 16
    assert len(seen["video"]) == 16  # of the custom pipeline
    assert dict(seen["scheduler"].config)["timestep_scaling"] == 4.0
    expected = sample(whole, 4)
    torch.testing.assert_close(sample(seen["pipe"], 4), expected)
    whole.unet = seen["unet"]  # PEFT's, merged
    torch.testing.assert_close(sample(whole, 4), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", range(1, 9))
def test_what_it_says_of_the_timesteps(steps):
    """ComfyUI's `simple` takes entry `int(i · 50 / steps)` of the grid from its noisy end."""
    scheduler = MCMScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [999 - 20 * int(i * 50 / steps) for i in range(steps)]


def test_what_it_says_of_the_timestep_scaling():
    grid = torch.arange(19, 1000, 20, dtype=torch.float64)
    (skip, out), (skip_comfy, out_comfy) = (boundary_scalings(grid, scaling) for scaling in (4.0, 10.0))
    assert (skip - skip_comfy).abs().max() < 4e-5
    assert (out - out_comfy).abs().max() < 4e-5
