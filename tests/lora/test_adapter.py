"""A LoRA as an object: its pairs, ranks and scales."""

import pytest

from diffusers_mcm.lora import (
    LoRA,
    extract_lora,
    fresh_lora,
    load_lora_into,
    lora_layers,
    lora_state_dict,
    read_lora,
    write_lora_weights,
)
from tests.lora.test_layers import assert_untouched
from tests.tiny import FEW_MODULES


def test_ranks_may_differ_and_without_alpha_the_scale_is_one(unet, tmp_path):
    tensors = fresh_lora(unet, FEW_MODULES[:2], rank=2).tensors | fresh_lora(unet, FEW_MODULES[2:], rank=3).tensors
    write_lora_weights(tmp_path / "x.safetensors", {"unet": LoRA(tensors)})
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


def test_half_a_pair(folder, unet):
    lora = read_lora(folder)
    del lora.tensors["transformer_in.proj_in.lora_B.weight"]
    with pytest.raises(ValueError, match="transformer_in.proj_in has only one of lora_A and lora_B.*incomplete"):
        load_lora_into(unet, lora)
    assert_untouched(unet)
