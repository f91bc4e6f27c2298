"""LoRAs of the world for Wan: in every naming the same effect, and what is none of it is named."""

import pytest
import torch
from diffusers import WanPipeline

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, WanMCMPipeline
from diffusers_mcm.lora import fresh_lora
from tests.tiny_wan import save_wan_base, tiny_wan_transformer
from tests.wan_loras import (
    ALPHA,
    LORA_TENSORS,
    RANK,
    WAN,
    WAN_PIPE,
    diffusers_file,
    musubi_file,
    original_file,
    peft_file,
    sample,
    sums,
    write,
)

tensors, pipe = LORA_TENSORS, WAN_PIPE


# --- namings ---------------------------------------------------------------------------------------------------------
NAMINGS = {
    "diffusers": diffusers_file,
    "peft": peft_file,
    "peft in a network": lambda tensors: {
        key.replace(".weight", ".default.weight"): tensor for key, tensor in peft_file(tensors).items()
    },
    "plain": lambda tensors: diffusers_file(tensors, ""),
    "lora_down and lora_up": original_file,
    "lora_A and lora_B": lambda tensors: original_file(tensors, halves=("lora_A.weight", "lora_B.weight")),
    "no prefix": lambda tensors: original_file(tensors, prefix=""),
    "musubi": musubi_file,
}
WITH_ALPHA = {
    "lora_down and lora_up": lambda tensors: original_file(tensors, ALPHA),
    "lora_A and lora_B": lambda tensors: original_file(tensors, ALPHA, halves=("lora_A.weight", "lora_B.weight")),
    "bfloat16": lambda tensors: original_file(tensors, torch.tensor(ALPHA, dtype=torch.bfloat16)),
    "float64 of one dimension": lambda tensors: original_file(tensors, torch.tensor([ALPHA], dtype=torch.float64)),
    "musubi": lambda tensors: musubi_file(tensors, ALPHA),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("how", ["file", "tensors", "mcm"])
def test_every_naming_is_the_same_lora(pipe, tensors, tmp_path, naming, how):
    file = NAMINGS[naming](tensors)
    if how == "tensors":
        pipe.load_lora_weights(file)
    else:
        getattr(pipe, "load_lora_weights" if how == "file" else "load_mcm_lora")(
            write(tmp_path / "x.safetensors", file)
        )
    assert len(pipe._layers) == 20
    pipe.scheduler = MCMFlowScheduler(stochastic=False)
    torch.testing.assert_close(sample(pipe), sample(sums(tensors)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("naming", WITH_ALPHA)
def test_an_alpha_is_the_scale_times_the_rank(pipe, tensors, tmp_path, naming):
    pipe.load_lora_weights(write(tmp_path / "x.safetensors", WITH_ALPHA[naming](tensors)))
    assert {layer.scaling["default"] for layer in pipe._layers.values()} == {ALPHA / RANK}
    torch.testing.assert_close(sample(pipe), sample(sums(tensors, scale=ALPHA / RANK)), rtol=0, atol=1e-5)


def test_a_module_without_alpha_beside_others_that_have_one_has_a_scale_of_one(pipe, tensors):
    file = original_file(tensors, ALPHA)
    del file["diffusion_model.blocks.1.ffn.2.alpha"]
    pipe.load_lora_weights(file)
    scales = {name.removeprefix("transformer."): layer.scaling["default"] for name, layer in pipe._layers.items()}
    assert scales.pop("blocks.1.ffn.net.2") == 1.0 and set(scales.values()) == {ALPHA / RANK}


@pytest.mark.parametrize("naming", ["lora_down and lora_up", "musubi"])
def test_diffusers_own_pipeline_makes_the_same_of_a_foreign_file(pipe, tensors, tmp_path, naming):
    """What stock diffusers reads of these files is what we read of them."""
    path = write(tmp_path / "x.safetensors", WITH_ALPHA[naming](tensors))
    theirs = WanPipeline(**pipe.components)
    pipe.load_lora_weights(path)
    ours = sample(pipe)
    pipe.unload_lora_weights()
    theirs.load_lora_weights(path)
    torch.testing.assert_close(sample(theirs), ours, rtol=0, atol=1e-6)


def test_namings_may_be_mixed(pipe, tensors):
    halves = [{key: each for key, each in tensors.items() if key.startswith(f"blocks.{i}.")} for i in (0, 1)]
    pipe.load_lora_weights(original_file(halves[0]) | musubi_file(halves[1]))
    torch.testing.assert_close(sample(pipe), sample(sums(tensors)), rtol=0, atol=1e-5)


def test_one_place_is_not_filled_twice(pipe, tensors):
    key = "blocks_0_self_attn_q.lora_down.weight"
    twice = original_file(tensors) | {f"lora_unet_{key}": tensors["blocks.0.attn1.to_q.lora_A.weight"]}
    message = (
        "holds blocks.0.attn1.to_q.lora_A.weight of the transformer twice, as 'diffusion_model.blocks.0.self_attn"
    )
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(twice)


# --- what is refused, by name ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "diffusion_model.nowhere.lora_down.weight",
            "1 of its 41 keys are no part of a LoRA.*'diffusion_model.nowhere",
        ),
        ("model.diffusion_model.x.lora_A.weight", "x.lora_A.weight'. It (is for|was made for) another"),
        ("text_encoders.umt5xxl.shared.lora_A.weight", "'text_encoders.umt5xxl.shared.lora_A.weight'"),
        ("lora_te_encoder_block_0.lora_down.weight", "'lora_te_encoder_block_0.lora_down.weight'"),
        ("diffusion_model.blocks.0.self_attn.q.set_weight", "'diffusion_model.blocks.0.self_attn.q.set_weight'"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "is a DoRA; only plain LoRA is supported"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", "It is a LoHa, and only plain LoRA is supported"),
        ("diffusion_model.blocks.0.norm3.alpha", "'diffusion_model.blocks.0.norm3.alpha'"),  # of nothing
        ("transformer_2.blocks.0.attn1.to_q.lora_A.weight", "a LoRA for the transformer_2, and this pipeline has no"),
    ],
)
@pytest.mark.parametrize("how", ["file", "tensors"])
def test_a_key_without_a_place_is_named(pipe, tensors, tmp_path, key, message, how):
    file = original_file(tensors) | {key: torch.zeros(())}
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(file if how == "tensors" else write(tmp_path / "x.safetensors", file))
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("text_encoder.encoder.block.0.q.lora_A.weight", "changes the text encoder too, which stays as it is here"),
        ("vae.decoder.conv_in.lora_A.weight", "changes the autoencoder too, which stays as it is here; remove those"),
        ("diffusion_model.other.lora_A.weight", "It is for another model than Wan, or is incomplete"),
    ],
)
def test_and_where_no_network_is_there_to_ask(tensors, tmp_path, key, message):
    path = write(tmp_path / "x.safetensors", original_file(tensors) | {key: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=message):
        MCMPipeline.from_pretrained(path)


def test_half_a_pair_an_alpha_that_is_none_and_a_file_that_was_cut(pipe, tensors, tmp_path):
    for half in ("down", "up"):
        cut = original_file(tensors, ALPHA)
        del cut[f"diffusion_model.blocks.1.ffn.0.lora_{half}.weight"]
        with pytest.raises(ValueError, match="have only one of lora_A and lora_B, such as 'blocks.1.ffn.net.0.proj'"):
            pipe.load_lora_weights(write(tmp_path / "cut.safetensors", cut))
    for alpha in (torch.ones(2), torch.tensor(float("nan"))):
        strange = original_file(tensors) | {"diffusion_model.blocks.0.ffn.0.alpha": alpha}
        with pytest.raises(ValueError, match="such as 'diffusion_model.blocks.0.ffn.0.alpha'"):
            pipe.load_lora_weights(strange)
    path = write(tmp_path / "x.safetensors", original_file(tensors))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or not a safetensors file.*Fetch it again"):
        pipe.load_lora_weights(path)
    assert pipe.get_list_adapters() == {}


def test_a_lora_of_another_size(pipe, tmp_path):
    larger = tiny_wan_transformer(num_attention_heads=4, ffn_dim=64)
    lora = fresh_lora(larger, WAN.lora_target_modules(larger), rank=2)
    with pytest.raises(ValueError, match=r"has a weight of shape \(24, 24\), the LoRA \(48, 2\) x \(2, 48\)"):
        pipe.load_lora_weights(write(tmp_path / "x.safetensors", original_file(lora.tensors)))


def test_a_foreign_file_alone_finds_its_base_model(tensors, tmp_path):
    base = save_wan_base(tmp_path / "base")
    path = write(tmp_path / "x.safetensors", original_file(tensors, ALPHA))
    pipe = MCMPipeline.from_pretrained(path, base_model=base)
    assert type(pipe) is WanMCMPipeline and pipe.get_active_adapters() == ["mcm"]
    pipe.scheduler = MCMFlowScheduler(stochastic=False)
    torch.testing.assert_close(sample(pipe), sample(sums(tensors, scale=ALPHA / RANK)), rtol=0, atol=1e-5)
