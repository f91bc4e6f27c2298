"""Nothing is read twice: how often files are opened, ours and those that diffusers opens besides."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.lora import CONFIG_NAME, WEIGHTS_NAME
from diffusers_mcm.publish import record_sample, stage_lora
from tests.reads import reads
from tests.tiny import NUM_FRAMES, save_tiny_base, save_tiny_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    save_tiny_lora(folder / "lora", base=folder / "base")
    return folder


@pytest.fixture(scope="module")
def stock(world):
    """How often diffusers opens a `model_index.json`, left alone."""
    with reads() as found:
        DiffusionPipeline.from_pretrained(world / "base", use_safetensors=True)
    return found["model_index.json"]


def test_a_lora(world, stock):
    with reads() as found:
        MCMPipeline.from_pretrained(world / "lora")
    assert found[WEIGHTS_NAME] == found[CONFIG_NAME] == 1
    assert found["model_index.json"] == stock + 1


def test_a_pipeline(world, stock):
    with reads() as found:
        MCMPipeline.from_pretrained(world / "base")
    assert found["model_index.json"] == stock + 1


def test_a_saved_pipeline_with_its_loras(world, stock, tmp_path):
    MCMPipeline.from_pretrained(world / "lora").save_pretrained(tmp_path)
    with reads() as found:
        MCMPipeline.from_pretrained(tmp_path)
    assert found["model_index.json"] == stock + 1
    assert found[WEIGHTS_NAME] == found[CONFIG_NAME] == found["mcm_adapters.json"] == 1


def test_a_style_lora(world, tmp_path):
    pipe = MCMPipeline.from_pretrained(world / "base")
    plain = load_file(world / "lora" / WEIGHTS_NAME)
    save_file(plain, tmp_path / "plain.safetensors")
    names = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    kohya = {
        f"lora_unet_{key.removeprefix('unet.').removesuffix(old).replace('.', '_')}{new}": tensor
        for key, tensor in plain.items()
        for old, new in names.items()
        if key.endswith(old)
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    for name in ("plain", "kohya"):
        with reads() as found:
            pipe.load_lora_weights(tmp_path / f"{name}.safetensors", name)
        assert found[f"{name}.safetensors"] == 1


def test_publishing(world, tmp_path):
    save_tiny_lora(tmp_path / "lora", base="owner/base")
    with reads() as found:
        record_sample(tmp_path / "lora", np.zeros((NUM_FRAMES, 16, 16, 3), np.uint8), "a ring", fps=8)
    assert found[WEIGHTS_NAME] == 0 and found[CONFIG_NAME] == 1
    (tmp_path / "staged").mkdir()
    with reads() as found:
        stage_lora(tmp_path / "lora", tmp_path / "staged", "me/mcm")
    assert found[WEIGHTS_NAME] == found[CONFIG_NAME] == 1
