"""A LoRA is found whatever its file is called, and written whole, exactly, and so that stock diffusers reads it."""

import json
import os
import shutil
import stat
import warnings

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mcm import MCMPipeline, hub
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.location import Location
from diffusers_mcm.lora import (
    CONFIG_NAME,
    METADATA_KEY,
    MOTION_HEAD_NAME,
    WEIGHTS_NAME,
    add_lora,
    load_lora_into,
    lora_state_dict,
    read_lora,
)
from tests.hub_server import hub_server
from tests.lora.test_layers import output
from tests.tiny import EXACT, FEW_MODULES, randomise_lora, save_lora, save_tiny_base, save_tiny_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


# --- read -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    return save_tiny_lora(folder / "lora", base=folder / "base") / WEIGHTS_NAME


def place(lora, folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(lora, folder / name)
    return folder


@pytest.mark.parametrize("name", ["watercolour.safetensors", "W.SAFETENSORS", "w.sft"])
def test_a_folder_with_one_file_of_its_own_name(lora, tmp_path, name):
    folder = place(lora, tmp_path / "style", name, MOTION_HEAD_NAME, "._copy.safetensors")
    expected = read_lora(lora).tensors
    for found in (read_lora(folder), read_lora(folder / name), read_lora(folder, weight_name=name)):
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[key], expected[key]) for key in expected)


def test_a_pipeline_of_it(lora, tmp_path):
    folder = place(lora, tmp_path / "style", "watercolour.safetensors")
    assert MCMPipeline.from_pretrained(folder, base_model=lora.parents[1] / "base").get_active_adapters() == ["mcm"]


def test_several_files_are_named(lora, tmp_path):
    place(lora, tmp_path, "a.safetensors", "b.sft")
    with pytest.raises(ValueError, match="several files in .*: a.safetensors, b.sft; name one with `weight_name`"):
        read_lora(tmp_path)
    assert read_lora(tmp_path, weight_name="b.sft").tensors
    place(lora, tmp_path, WEIGHTS_NAME)  # a usual name is what is meant
    assert read_lora(tmp_path).source == str(tmp_path / WEIGHTS_NAME)


def test_no_file_of_a_whole_pipeline_is_taken_for_a_lora(lora, tmp_path):
    (place(lora, tmp_path, "v1-5.safetensors") / "model_index.json").write_text("{}")
    assert Location.of(tmp_path).find_lora_file() is None


def test_on_the_hub_and_then_offline(lora, tmp_path):
    place(lora, tmp_path / "owner" / "style", "watercolour.safetensors")
    place(lora, tmp_path / "owner" / "style" / "more", "a.SAFETENSORS", "b.safetensors")
    options = dict(cache_dir=tmp_path / "cache")
    with hub_server(tmp_path):
        expected = read_lora("owner/style", **options).source
        with pytest.raises(ValueError, match="owner/style .subfolder 'more'.: a.SAFETENSORS, b.safetensors; name one"):
            read_lora("owner/style", subfolder="more", **options)
        assert read_lora("owner/style", subfolder="more", weight_name="a.SAFETENSORS", **options).tensors
    assert expected.endswith("watercolour.safetensors")
    assert read_lora("owner/style", local_files_only=True, **options).source == expected


@pytest.mark.parametrize("alpha", [4, 8])
def test_peft_layout_is_read_to_the_same_effect(folder, tmp_path, alpha):
    tensors = {key.replace("unet.", "base_model.model."): t for key, t in load_file(folder / WEIGHTS_NAME).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha, "peft_type": "LORA"}))
    lora, reference = read_lora(tmp_path), read_lora(folder)
    assert lora.tensors.keys() == reference.tensors.keys() and lora.alpha == alpha
    reference.alpha = alpha
    ours, theirs = (tiny_unet() for _ in range(2))
    load_lora_into(ours, lora)
    load_lora_into(theirs, reference)
    assert torch.equal(output(ours), output(theirs))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", "cut"])
def test_a_corrupt_file(folder, tmp_path, content):
    if content == "cut":
        content = (folder / WEIGHTS_NAME).read_bytes()[:-100]
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a safetensors file.*Fetch it again"):
        read_lora(tmp_path)


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="not a .safetensors file; pickled weights are not read"):
        read_lora(tmp_path / "weights.bin")


@pytest.mark.parametrize("keys", [["lora_unet_down_blocks_0.lora_down.weight"], ["conv_in.weight"], []])
def test_another_layout(tmp_path, keys):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"is not a LoRA in diffusers'.*{len(keys)} of its {len(keys)} keys"):
        read_lora(tmp_path)


def test_dora_is_refused(folder, tmp_path):
    save_file(load_file(folder / WEIGHTS_NAME), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(ValueError, match="DoRA; only plain LoRA is supported"):
        read_lora(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No LoRA in .*pytorch_lora_weights.safetensors or adapter_model"):
        read_lora(tmp_path)
    with pytest.raises(FileNotFoundError, match="subfolder 'x'.*there is no mine.safetensors"):
        read_lora(tmp_path, subfolder="x", weight_name="mine.safetensors")
    with pytest.raises(FileNotFoundError, match="owner/name"):
        read_lora("nothing-of-that-name")


def test_the_packaged_layout_is_a_lora_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PACKAGED_FOLDER", tmp_path)
    save_tiny_lora(tmp_path / "mcm-shapes", base="mcm-shapes-teacher")
    assert read_lora("mcm-shapes").settings.base_model_repository == "mcm-shapes-teacher"


# --- written ---------------------------------------------------------------------------------------------------------
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
