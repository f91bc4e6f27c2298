"""What LoRAs for Wan add to whole parameters: all of it acts, and all of it goes away again."""

import copy
import json

import pytest
import torch
from diffusers import WanPipeline

from diffusers_mcm import MCMPipeline
from diffusers_mcm.lora import LoRA, load_lora_into
from tests.tiny import realign
from tests.tiny_wan import tiny_wan_transformer
from tests.wan_loras import (
    ALPHA,
    IN_A_BLOCK,
    LORA_TENSORS,
    RANK,
    WAN_PIPE,
    as_keys,
    original_file,
    random_differences,
    sample,
    sums,
    write,
)

tensors, pipe = LORA_TENSORS, WAN_PIPE


@pytest.fixture(scope="module")
def differences():
    return random_differences(tiny_wan_transformer())


# --- differences of whole parameters ---------------------------------------------------------------------------------
@pytest.fixture
def whole(tensors, differences, tmp_path):
    return write(tmp_path / "whole.safetensors", original_file(tensors, ALPHA) | as_keys(differences))


def test_differences_are_added_to_their_parameters(pipe, tensors, differences, whole):
    plain = sample(pipe)
    pipe.load_lora_weights(whole)
    video = sample(pipe)
    torch.testing.assert_close(video, sample(sums(tensors, differences, ALPHA / RANK)), rtol=0, atol=1e-5)
    without = sample(sums(tensors, scale=ALPHA / RANK))
    assert not torch.allclose(video, without, atol=1e-2) and not torch.allclose(video, plain, atol=1e-2)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.bias", "blocks.0.norm2.weight", "blocks.1.scale_shift_table"])
def test_none_of_them_is_left_out(pipe, tensors, differences, name):
    """Each for itself makes a difference."""
    pipe.load_lora_weights(original_file(tensors) | as_keys({name: differences[name]}))
    video = sample(pipe)
    torch.testing.assert_close(video, sample(sums(tensors, {name: differences[name]})), rtol=0, atol=1e-5)
    assert not torch.allclose(video, sample(sums(tensors)), atol=1e-4)


def test_lightx2vs_name_of_a_modulation(pipe, tensors, differences):
    tables = {name: differences[name] for name in ("blocks.1.scale_shift_table", "scale_shift_table")}
    keys = {"diffusion_model.blocks.1.diff_m": tables["blocks.1.scale_shift_table"]}
    keys["diffusion_model.head.diff_m"] = tables["scale_shift_table"]
    pipe.load_lora_weights(original_file(tensors) | keys)
    torch.testing.assert_close(sample(pipe), sample(sums(tensors, tables)), rtol=0, atol=1e-5)


def test_the_verbs_weigh_switch_fuse_and_take_them_out(pipe, tensors, differences, whole):
    before = {name: each.clone() for name, each in pipe.transformer.state_dict().items()}
    plain = sample(pipe)
    pipe.load_lora_weights(whole, "world")
    video = sample(pipe)
    half = sample(sums(tensors, differences, ALPHA / RANK, strength=0.5))
    torch.testing.assert_close(sample(pipe, lora_scale=0.5), half, rtol=0, atol=1e-5)
    assert torch.equal(sample(pipe), video)
    pipe.set_adapters("world", 0.5)
    torch.testing.assert_close(sample(pipe), half, rtol=0, atol=1e-5)
    pipe.disable_lora()
    assert torch.equal(sample(pipe), plain)
    pipe.enable_lora()
    torch.testing.assert_close(sample(pipe), half, rtol=0, atol=1e-5)
    pipe.set_adapters("world", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(sample(pipe), half, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(sample(pipe), video)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(sample(pipe), plain)


def test_two_adapters_add_up_and_one_can_go(pipe, tensors, differences, whole):
    pipe.load_lora_weights(whole, "world")
    alone = sample(pipe)
    other = {"blocks.0.norm2.weight": -differences["blocks.0.norm2.weight"]}
    pipe.load_lora_weights(original_file(tensors) | as_keys(other), "other")
    pipe.set_adapters(["world", "other"], [1.0, 0.5])
    both = dict(pipe.transformer.named_parameters())["blocks.0.norm2.weight"]
    base = dict(tiny_wan_transformer().named_parameters())["blocks.0.norm2.weight"]
    torch.testing.assert_close(both, base + 0.5 * differences["blocks.0.norm2.weight"])
    pipe.set_adapters("world")
    assert torch.equal(sample(pipe), alone)
    pipe.delete_adapters("other")
    assert torch.equal(sample(pipe), alone)
    pipe.delete_adapters("world")
    assert torch.equal(dict(pipe.transformer.named_parameters())["blocks.0.norm2.weight"], base)


@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_pipeline_holds_the_clean_base_and_all_of_the_lora(pipe, whole, tmp_path, fused):
    plain = sample(pipe)
    pipe.load_lora_weights(whole, "world")
    if fused:
        pipe.fuse_lora()
    video = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(sample(pipe), video)
    again = MCMPipeline.from_pretrained(tmp_path / "saved")
    again.scheduler = pipe.scheduler
    realign(again)
    torch.testing.assert_close(sample(again), video, **(dict(rtol=0, atol=1e-4) if fused else dict(rtol=0, atol=0)))
    again.unload_lora_weights()
    assert torch.equal(sample(again), plain)


def test_a_copy_has_them_too(pipe, whole):
    pipe.load_lora_weights(whole)
    copied = copy.deepcopy(pipe)
    assert torch.equal(sample(copied), sample(pipe))
    pipe.unload_lora_weights()
    assert not torch.allclose(sample(copied), sample(pipe), atol=1e-2)


def test_after_a_change_of_type_the_base_is_that_of_the_type(pipe, whole):
    pipe.load_lora_weights(whole)
    pipe.to(dtype=torch.float64)
    pipe.unload_lora_weights()
    expected = tiny_wan_transformer().double().state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in pipe.transformer.state_dict().items())


def test_differences_that_cannot_be_added(pipe, tensors, differences):
    file = original_file(tensors)
    for key, shape, message in (
        (
            "diffusion_model.blocks.0.norm3.diff",
            (3,),
            r"blocks.0.norm2.weight has shape \(24,\), what is added .*\(3,\)",
        ),
        ("diffusion_model.blocks.9.norm3.diff", (24,), "there is no blocks.9.norm2.weight, to which it adds"),
        ("diffusion_model.blocks.0.cross_attn.v_img.diff_b", (24,), "there is no blocks.0.attn2.add_v_proj.bias"),
        ("diffusion_model.blocks.0.self_attn.q.diff", (24, 24), "changes the weight of blocks.0.attn1.to_q twice"),
        ("diffusion_model.vace_blocks.0.norm3.diff", (24,), r"1 of its 41 keys .*'diffusion_model.vace_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(file | {key: torch.zeros(shape)})
    with pytest.raises(ValueError, match="keys are no part of a LoRA"):
        pipe.load_lora_weights(as_keys(differences))  # and no pair
    assert pipe.get_list_adapters() == {} and not pipe._adapters.differences
    pipe.transformer.norm_out.to(torch.float8_e4m3fn)
    pipe.transformer.proj_out.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="Cannot add to transformer.proj_out.bias, which is torch.float8_e4m3fn"):
        pipe.load_lora_weights(file | as_keys({"proj_out.bias": differences["proj_out.bias"]}))


@pytest.mark.parametrize("verb", ["load_lora_weights", "fuse_lora", "unload_lora_weights"])
def test_what_is_broken_off_loses_no_parameter(pipe, whole, differences, monkeypatch, verb):
    """No memory for a sum, say, or for the base model's own values on their way back."""
    plain = sample(pipe)
    arguments = (whole,) if verb == "load_lora_weights" else ()
    if not arguments:
        pipe.load_lora_weights(whole)
        pipe.set_adapters("default", 0.5)
    before, calls = sample(pipe), []
    checks = len(differences) if arguments else 0  # before anything is changed
    find = type(pipe)._parameter

    def out_of_memory(self, name):
        calls.append(name)
        if len(calls) == checks + 2:
            raise torch.OutOfMemoryError("no memory left")
        return find(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "_parameter", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            getattr(pipe, verb)(*arguments, **{"lora_scale": 0.3} if verb == "fuse_lora" else {})
    if verb != "unload_lora_weights":
        assert torch.equal(sample(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)


def test_while_the_weights_are_offloaded_nothing_changes_by_halves(pipe, whole):
    """Neither as accelerate does it, weight by weight, nor as diffusers does, from copies of its own."""
    pipe.load_lora_weights(whole, "world")
    video = sample(pipe)
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    verbs = {
        "change adapters": lambda: pipe.set_adapters("world", 0.5),
        "switch the LoRA off": pipe.disable_lora,
        "switch the LoRA on": pipe.enable_lora,
        "take the LoRA out": pipe.unload_lora_weights,
        "scale the LoRA by 0.5": lambda: sample(pipe, lora_scale=0.5),
        "fuse again": pipe.fuse_lora,
    }
    for what, verb in verbs.items():
        with pytest.raises(
            ValueError, match=rf"Cannot {what} while the weights of the transformer are offloaded, for"
        ):
            verb()
    assert torch.equal(sample(pipe), video)


def test_offloaded_weight_by_weight(pipe, whole):
    from accelerate import cpu_offload

    pipe.load_lora_weights(whole, "world")
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(
        ValueError, match="Cannot switch the LoRA off while the weights of the transformer are offload"
    ):
        pipe.disable_lora()


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_diffusers_name_of_what_is_added_to_a_bias(pipe, tensors, differences, tmp_path, alpha):
    """What its converter makes of a `diff_b`; it is scaled as the pair is."""
    name = "blocks.0.attn1.to_q.bias"
    header = {"transformer.r": RANK, "transformer.lora_alpha": alpha or RANK}
    file = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    file["transformer.blocks.0.attn1.to_q.lora_B.bias"] = differences[name]
    path = write(tmp_path / "x.safetensors", file, {"lora_adapter_metadata": json.dumps(header)})
    pipe.load_lora_weights(path)
    scale = (alpha or RANK) / RANK
    expected = sums(tensors, {name: scale * differences[name]}, scale)
    torch.testing.assert_close(sample(pipe), sample(expected), rtol=0, atol=1e-5)


def test_where_there_is_nothing_but_pairs_they_are_not_dropped(tensors, differences):
    lora = LoRA(tensors, differences=differences)
    with pytest.raises(ValueError, match=r"adds to 14 parameters besides .*only its pairs of matrices can be put in"):
        load_lora_into(tiny_wan_transformer(), lora)


def test_diffusers_own_pipeline_adds_biases_as_we_do(pipe, tensors, differences, tmp_path):
    """It reads those of projections, as peft's `lora_bias`."""
    biases = {name: differences[name] for name in ("blocks.0.attn1.to_q.bias", "blocks.1.ffn.net.2.bias")}
    rest = {f"diffusion_model.blocks.{i}.{name}.diff_b": torch.zeros(size) for i, name, size in _other_biases(biases)}
    path = write(tmp_path / "x.safetensors", original_file(tensors) | as_keys(biases) | rest)
    pipe.to(dtype=torch.float64)  # they are summed up in another order
    theirs = WanPipeline(**pipe.components)
    pipe.load_lora_weights(path)
    video = sample(pipe)
    pipe.unload_lora_weights()
    theirs.load_lora_weights(path)
    torch.testing.assert_close(sample(theirs).double(), video.double(), rtol=0, atol=1e-6)


def _other_biases(biases):
    """The block, name and size of all biases of projections but these; peft has one for every pair, or none."""
    for i in (0, 1):
        for ours, name in IN_A_BLOCK.items():
            if f"blocks.{i}.{ours}.bias" not in biases:
                yield i, name, 32 if name == "ffn.0" else 24
