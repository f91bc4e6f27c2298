"""The table of Wan's names against diffusers' own network, and against the converters that diffusers has."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn

from diffusers_mcm.lora.layouts import is_wan, parameter_of, place_of
from diffusers_mcm.lora.wan_names import original_wan_module, wan_module
from tests.tiny_wan import tiny_wan_transformer


def of_pictures() -> WanTransformer3DModel:
    """One that makes a picture move, which has the modules of those without, and more."""
    return tiny_wan_transformer(added_kv_proj_dim=24, image_dim=8, in_channels=36)


def test_every_module_with_weights_has_one_name_on_either_side():
    transformer = of_pictures()
    modules = {
        name.rpartition(".")[0] for name, _ in transformer.named_parameters() if "scale_shift_table" not in name
    }
    theirs = {name: original_wan_module(name) for name in modules}
    assert None not in theirs.values() and len(set(theirs.values())) == len(modules)
    for name, original in theirs.items():
        assert {wan_module(spelling) for spelling in (original, original.replace(".", "_"), name)} == {name}
        assert wan_module(name.replace(".", "_")) == name


def test_the_names_are_those_that_diffusers_converts():
    """Its converter of whole checkpoints knows the original names of all parameters."""
    transformer = of_pictures()
    state = {}
    for name, tensor in transformer.state_dict().items():
        module, _, kind = name.rpartition(".")
        if kind == "scale_shift_table":
            state[original_wan_module(name)] = tensor
        else:
            state[f"{original_wan_module(module)}.{kind}"] = tensor
    converted = convert_wan_transformer_to_diffusers(dict(state))
    expected = transformer.state_dict()
    assert converted.keys() == expected.keys()
    assert all(converted[name] is expected[name] or torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn3.to_q", "vace_blocks.0.self_attn.q", "blocks.x.ffn.0", "mid_block", ""]
)
def test_what_is_none_of_wans(name):
    assert wan_module(name) is original_wan_module(name) is None


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", ("", "blocks.0.attn1.to_q", "lora_A.weight")),
        ("lora_unet_blocks_12_ffn_0.lora_up.weight", ("", "blocks.12.ffn.net.0.proj", "lora_B.weight")),
        ("lora_unet_blocks_1_cross_attn_o.alpha", ("", "blocks.1.attn2.to_out.0", "alpha")),
        ("transformer_2.blocks.1.attn1.to_k.lora_A.weight", ("transformer_2", "blocks.1.attn1.to_k", "lora_A.weight")),
        ("diffusion_model.blocks.1.norm3.diff_b", ("", "blocks.1.norm2", "diff_b")),
        ("diffusion_model.blocks.1.diff_m", ("", "blocks.1.scale_shift_table", "diff")),
        ("diffusion_model.head.diff_m", ("", "scale_shift_table", "diff")),
        ("base_model.model.blocks.0.attn1.to_q.lora_A.default.weight", ("", "blocks.0.attn1.to_q", "lora_A.weight")),
        ("diffusion_model.blocks.1.self_attn.q.set_weight", ("", "blocks.1.self_attn.q.set_weight", "")),
    ],
)
def test_the_place_of_a_key(key, place):
    assert place_of(key) == place


def test_whose_keys_they_are():
    assert is_wan(["unet.x", "diffusion_model.blocks.0.self_attn.q.alpha"])
    assert not is_wan(["unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight", "proj_out.lora_A.weight"])


def test_the_parameter_of_a_difference():
    places = [
        ("a.b", "diff"),
        ("a.b", "diff_b"),
        ("blocks.0.scale_shift_table", "diff"),
        ("scale_shift_table", "diff"),
    ]
    names = ["a.b.weight", "a.b.bias", "blocks.0.scale_shift_table", "scale_shift_table"]
    assert [parameter_of(*place) for place in places] == names


def test_a_convolution_is_among_them():
    assert isinstance(tiny_wan_transformer().patch_embedding, nn.Conv3d)
