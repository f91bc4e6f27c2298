import json
import os
import stat
import warnings

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_mcm import hub
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.lora import (
    CONFIG_NAME,
    METADATA_KEY,
    WEIGHTS_NAME,
    LoRA,
    add_lora,
    check_fits,
    extract_lora,
    fresh_lora,
    load_lora_into,
    lora_disabled,
    lora_layers,
    lora_state_dict,
    read_lora,
    save_lora,
    set_lora_state_dict,
    write_lora_weights,
)
from tests.tiny import EXACT, FEW_MODULES, TEXT_DIM, randomise_lora, save_tiny_lora, tiny_unet

MODELSCOPE = get_base_model("modelscope")


@pytest.fixture
def unet():
    return tiny_unet().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    modules = MODELSCOPE.lora_target_modules(tiny_unet())
    return save_tiny_lora(tmp_path_factory.mktemp("lora"), base="owner/base", revision="abc", modules=modules)


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 5, TEXT_DIM, generator=generator)
    return unet(latents.to(unet.dtype), torch.tensor([500]), embeds.to(unet.dtype)).sample


# --- in the denoiser -------------------------------------------------------------------------------------------------
def test_a_fresh_lora_changes_nothing_and_alone_is_trainable(unet):
    before = output(unet)
    targets = MODELSCOPE.lora_target_modules(unet)
    add_lora(unet, targets, rank=2, alpha=2)
    assert MODELSCOPE.lora_target_modules(unet) == targets
    assert torch.equal(output(unet), before)
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in unet.named_parameters() if ".lora_" in name}
    assert len(trainable) == 2 * len(targets)


def test_fresh_lora_depends_on_its_generator_and_on_nothing_else(unet):
    def draw(seed):
        return fresh_lora(unet, FEW_MODULES, rank=2, generator=torch.Generator().manual_seed(seed)).tensors

    state = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    add_lora(unet, FEW_MODULES, rank=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key], tensor) for key, tensor in lora_state_dict(unet).items())
    assert not any(torch.equal(first[key], other[key]) for key in first if ".lora_A." in key)


def test_lora_is_w_plus_scaled_b_a(unet):
    """Against the definition, on a linear layer and on a convolution."""
    add_lora(unet, FEW_MODULES, rank=3, alpha=6)
    randomise_lora(unet)
    tensors = lora_state_dict(unet)
    for name, x in (
        ("transformer_in.proj_in", torch.randn(2, 5, 8)),
        ("mid_block.resnets.0.conv1", torch.randn(2, 16, 4, 4)),
    ):
        layer = lora_layers(unet)[name]
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        base = layer.get_base_layer()
        delta = 2.0 * torch.tensordot(up.flatten(1), down, dims=1)
        with torch.no_grad():
            if delta.ndim == 2:
                expected = torch.nn.functional.linear(x, base.weight + delta, base.bias)
            else:
                expected = torch.nn.functional.conv2d(x, base.weight + delta, base.bias, padding=1)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_lora_disabled_is_the_base_bit_for_bit(unet):
    before = output(unet)
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    randomise_lora(unet)
    adapted = output(unet)
    assert not torch.allclose(adapted, before)
    with pytest.raises(RuntimeError, match="inside"):
        with lora_disabled(unet):
            assert torch.equal(output(unet), before)
            assert any(parameter.requires_grad for parameter in unet.parameters())
            raise RuntimeError("inside")
    assert torch.equal(output(unet), adapted)


def test_set_lora_state_dict_takes_exactly_its_own_keys(unet):
    add_lora(unet, FEW_MODULES, rank=2, alpha=2)
    saved = {key: torch.randn_like(tensor) for key, tensor in lora_state_dict(unet).items()}
    set_lora_state_dict(unet, saved)
    assert all(torch.equal(saved[key], tensor) for key, tensor in lora_state_dict(unet).items())
    key = next(iter(saved))
    with pytest.raises(ValueError, match="1 LoRA tensors differ in name or shape"):
        set_lora_state_dict(unet, {k: v for k, v in saved.items() if k != key})
    with pytest.raises(ValueError, match="1 LoRA tensors differ in name or shape"):
        set_lora_state_dict(unet, saved | {key: saved[key][:1]})


def test_unknown_adapter(unet):
    with pytest.raises(ValueError, match="no adapter named 'mine' in the denoiser. Loaded: none"):
        lora_state_dict(unet, "mine")


# --- files -----------------------------------------------------------------------------------------------------------
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


def test_ranks_may_differ_and_without_alpha_the_scale_is_one(unet, tmp_path):
    tensors = fresh_lora(unet, FEW_MODULES[:2], rank=2).tensors | fresh_lora(unet, FEW_MODULES[2:], rank=3).tensors
    write_lora_weights(tmp_path / "x.safetensors", LoRA(tensors))
    load_lora_into(unet, read_lora(tmp_path / "x.safetensors"))
    layers = lora_layers(unet)
    assert [layers[name].r["default"] for name in FEW_MODULES] == [2, 2, 3, 3]
    assert [layers[name].scaling["default"] for name in FEW_MODULES] == [1.0] * 4
    assert extract_lora(unet).ranks() == dict(zip(FEW_MODULES, (2, 2, 3, 3)))


def test_a_loaded_lora_is_a_copy(unet):
    lora = fresh_lora(unet, ["transformer_in.proj_in"], rank=2)
    load_lora_into(unet, lora)
    lora.tensors["transformer_in.proj_in.lora_A.weight"].zero_()
    assert lora_state_dict(unet)["transformer_in.proj_in.lora_A.weight"].any()


# --- what does not fit -----------------------------------------------------------------------------------------------
def assert_untouched(unet):
    assert not lora_layers(unet) and not hasattr(unet, "peft_config")


def test_keys_that_match_nothing_or_in_part(folder, unet):
    lora = read_lora(folder)
    count = len(lora.modules)
    everything = LoRA({f"elsewhere.{key}": tensor for key, tensor in lora.tensors.items()}, source="mine")
    with pytest.raises(
        ValueError, match=rf"mine does not fit.*{count} of its {count} modules do not exist.*elsewhere"
    ):
        load_lora_into(unet, everything)
    lora.tensors["mid_block.motion.proj.lora_A.weight"] = torch.zeros(4, 8)
    with pytest.raises(
        ValueError, match=rf"1 of its {count + 1} modules do not exist there, such as 'mid_block.motion"
    ):
        load_lora_into(unet, lora)
    assert_untouched(unet)


def test_half_a_pair(folder, unet):
    lora = read_lora(folder)
    del lora.tensors["transformer_in.proj_in.lora_B.weight"]
    with pytest.raises(ValueError, match="transformer_in.proj_in has only one of lora_A and lora_B.*incomplete"):
        load_lora_into(unet, lora)
    assert_untouched(unet)


def test_another_width(folder):
    wide = tiny_unet(block_out_channels=(8, 32))
    with pytest.raises(ValueError, match=r"has a weight of shape \(.*made for another base model"):
        check_fits(wide, read_lora(folder))


def test_a_module_that_takes_no_lora(unet):
    lora = LoRA({"conv_norm_out.lora_A.weight": torch.zeros(2, 8), "conv_norm_out.lora_B.weight": torch.zeros(8, 2)})
    with pytest.raises(ValueError, match="conv_norm_out is a GroupNorm, which takes no LoRA"):
        load_lora_into(unet, lora)


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a\\b"])
def test_bad_adapter_names(folder, unet, name):
    with pytest.raises(ValueError, match="must not be empty or contain a dot or slash"):
        load_lora_into(unet, read_lora(folder), name)


def test_an_adapter_name_twice(folder, unet):
    load_lora_into(unet, read_lora(folder), "a")
    with pytest.raises(ValueError, match="An adapter named 'a' is loaded already"):
        load_lora_into(unet, read_lora(folder), "a")


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


def test_targets_that_do_not_exist(unet):
    with pytest.raises(ValueError, match="modules that do not exist: .'nowhere'"):
        add_lora(unet, ["nowhere"])
    with pytest.raises(ValueError, match="none were named"):
        add_lora(unet, [])


def test_the_packaged_layout_is_a_lora_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PACKAGED_FOLDER", tmp_path)
    save_tiny_lora(tmp_path / "mcm-shapes", base="mcm-shapes-teacher")
    assert read_lora("mcm-shapes").settings.base_model_repository == "mcm-shapes-teacher"
