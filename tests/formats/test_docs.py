"""docs/other_tools.md is run from top to bottom, on tiny models that a local Hub serves under the real names."""

import shutil

import pytest
import torch
from PIL import Image

from diffusers_mcm import MCMPipeline, MCMScheduler
from diffusers_mcm.consistency import boundary_scalings
from tests.documents import ROOT, run_document
from tests.formats.world import sample
from tests.hub_server import hub_server
from tests.tiny import EXACT


def test_every_block_runs(hub_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(ROOT / "examples/community", tmp_path / "examples/community")
    monkeypatch.chdir(tmp_path)
    with hub_server(hub_root):
        (*_, seen), left_out = run_document("docs/other_tools.md")
        whole = MCMPipeline.from_pretrained("yhzhai/mcm", subfolder="animatediff-laion")
    assert left_out == set()
    assert "layout: peft" in capsys.readouterr().out
    with Image.open("stock.gif") as gif:
        assert gif.n_frames == 16
    assert len(seen["video"]) == 16  # of the custom pipeline
    assert dict(seen["scheduler"].config)["timestep_scaling"] == 4.0
    expected = sample(whole, 4)
    torch.testing.assert_close(sample(seen["pipe"], 4), expected, **EXACT)
    whole.unet = seen["unet"]  # PEFT's, merged in float32: the sums are rounded
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
