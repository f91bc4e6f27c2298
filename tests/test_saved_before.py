"""What version 0.1.0.dev0 wrote before settings and locations had types loads, and samples what it did then.

`saved_before/` holds a pipeline with two LoRAs at weights 0.75 and 0.5, and one of them as a folder of ours and of
PEFT's; `latents.safetensors` what that version sampled with each, in float64.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMPipeline, ModelScopeMCMPipeline
from diffusers_mcm.formats.description import describe
from tests.tiny import NUM_FRAMES, SIZE

FOLDER = Path(__file__).with_name("saved_before")
ADAPTERS = {"lora": ["mcm"], "peft": ["mcm"], "pipeline": ["mcm", "second"]}


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_samples_what_it_did(name):
    pipe = MCMPipeline.from_pretrained(FOLDER / name, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is ModelScopeMCMPipeline and pipe.get_active_adapters() == ADAPTERS[name]
    assert [pipe.sampling_default(key) for key in ("fps", "num_inference_steps", "num_frames")] == [5, 2, NUM_FRAMES]
    shape = (1, 4, NUM_FRAMES, SIZE // 2, SIZE // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = dict(generator=torch.Generator().manual_seed(0), output_type="latent")
    latents = pipe("a red ring", latents=noise, height=SIZE, width=SIZE, **options).frames
    expected = load_file(FOLDER / "latents.safetensors")
    # float64 but for diffusers' noise schedule and timestep embedding, whose last bits depend on the processor
    torch.testing.assert_close(latents, expected[name], rtol=0, atol=4e-6)
    other = next(each for each in expected if not torch.equal(expected[each], expected[name]))
    assert not torch.allclose(latents, expected[other], atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_it_says_how_it_was_made(name):
    found = describe(FOLDER / name)
    assert found["training"]["steps"] == 7 and found["training"]["video_data"] == "../clips"
    assert found["settings"]["num_inference_steps"] == 2 and found["alpha"] == 4 and found["rank"] == 2


def test_it_goes_on_to_a_new_folder_with_all_that_it_says(tmp_path):
    pipe = MCMPipeline.from_pretrained(FOLDER / "lora")
    pipe.save_mcm_lora(tmp_path / "again")
    then, now = describe(FOLDER / "lora"), describe(tmp_path / "again")
    for key in ("base_model", "rank", "alpha", "targets", "settings"):
        assert now[key] == then[key]
    assert now["training"]["steps"] == 7 and now["training"]["motion"] == "learnable"
