"""A LoRA is written whole, exactly, and so that stock diffusers reads it."""

import json
import os
import stat
import warnings

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.lora import (
    CONFIG_NAME,
    METADATA_KEY,
    WEIGHTS_NAME,
    add_lora,
    load_lora_into,
    lora_state_dict,
    read_lora,
)
from tests.lora.test_layers import output
from tests.tiny import EXACT, FEW_MODULES, randomise_lora, save_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


def test_what_is_saved(folder):
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config["base_model"] == "modelscope"
    assert (config["base_model_repository"], config["base_model_revision"]) == ("owner/base", "abc")
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        keys = list(file.keys())
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    targets = MODELSCOPE.lora_target_modules(tiny_unet())
    assert (metadata["unet.r"], metadata["unet.lora_alpha"], metadata["unet.target_modules"]) == (4, 4, targets)
    assert read_lora(folder).scheduler_config["timestep_scaling"] == 4.0


def test_saving_and_loading_is_exact(tmp_path, unet):
    add_lora(unet, FEW_MODULES, rank=2, alpha=5)
    randomise_lora(unet)
    for parameter in unet.parameters():
        parameter.requires_grad_(False)
    save_lora(tmp_path, unet, MODELSCOPE, repository=tmp_path / "base")
    other = tiny_unet().requires_grad_(False)
    load_lora_into(other, read_lora(tmp_path))
    assert torch.equal(output(other), output(unet))
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_repository"] == "./base"


def test_weights_are_written_whole_and_for_whom_the_umask_allows(tmp_path, unet, monkeypatch):
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    before = os.umask(0o027)
    try:
        save_lora(tmp_path, unet, MODELSCOPE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / WEIGHTS_NAME).stat().st_mode) == 0o640
    written = (tmp_path / WEIGHTS_NAME).read_bytes()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    randomise_lora(unet)
    with pytest.raises(OSError, match="disk full"):
        save_lora(tmp_path, unet, MODELSCOPE)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


def test_saving_in_half_precision(tmp_path, unet):
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    save_lora(tmp_path, unet, MODELSCOPE, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float16}
    other = tiny_unet()
    load_lora_into(other, read_lora(tmp_path))
    assert {tensor.dtype for tensor in lora_state_dict(other).values()} == {torch.float32}


class UNet3DWithMixin(UNet3DConditionModel, PeftAdapterMixin):
    """What stock diffusers needs a denoiser to be."""


def test_stock_diffusers_loads_the_file_fully(folder, unet):
    load_lora_into(unet, read_lora(folder))
    stock = UNet3DWithMixin(**unet.config).eval()
    stock.load_state_dict(tiny_unet().state_dict())
    stock.requires_grad_(False)
    state_dict, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, return_lora_metadata=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(
            state_dict, network_alphas=alphas, unet=stock, metadata=metadata, adapter_name="default"
        )
    for key, tensor in lora_state_dict(unet).items():
        assert torch.equal(stock.get_parameter(key.replace(".weight", ".default.weight")), tensor)
    torch.testing.assert_close(output(stock.double()), output(unet.double()), **EXACT)
