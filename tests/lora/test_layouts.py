"""The one table of namings, and where each layout keeps the scale."""

import json

import pytest
import torch

from diffusers_mcm.lora import METADATA_KEY, LoRA
from diffusers_mcm.lora.layouts import (
    DENOISER,
    PREFIXES,
    SECOND_DENOISER,
    TEXT_ENCODER,
    check_no_dora,
    denoiser_key,
    layout_of,
    recorded_config,
    renamed,
    set_scale,
    split_prefix,
)

ALL = [(layout, prefix, component) for layout in PREFIXES for prefix, component in PREFIXES[layout].items()]


@pytest.mark.parametrize(("layout", "prefix", "component"), ALL, ids=[prefix for _, prefix, _ in ALL])
def test_each_prefix_is_one_layout_of_one_component(layout, prefix, component):
    assert split_prefix(f"{prefix}mid.x") == (layout, component, "mid.x")
    stripped = component == DENOISER and layout in ("peft", "diffusers")
    assert denoiser_key(f"{prefix}mid.x") == ("mid.x" if stripped else f"{prefix}mid.x")
    told = layout if component in (DENOISER, SECOND_DENOISER) and layout != "OneTrainer" else None
    assert layout_of([f"{prefix}a", f"{prefix}b"]) == told


def test_keys_without_prefix_and_of_several_layouts():
    assert split_prefix("mid.unet.x") == ("", DENOISER, "mid.unet.x")
    assert layout_of([]) is layout_of(["a.b"]) is layout_of(["unet.a", "base_model.model.a"]) is None
    assert layout_of(["unet.a", "transformer.a"]) == "diffusers"
    assert layout_of(["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]) == "motion-module"


@pytest.mark.parametrize(
    ("old", "component", "new"),
    [
        ("a.attn1.processor.to_q_lora.down.weight", DENOISER, "a.attn1.to_q.lora_A.weight"),
        ("a.attn1.processor.to_out_lora.up.weight", DENOISER, "a.attn1.to_out.0.lora_B.weight"),
        ("a.lora_linear_layer.up.weight", DENOISER, "a.lora_B.weight"),
        ("a_b.lora_down.weight", DENOISER, "a_b.lora_A.weight"),
        ("a.self_attn.to_out_lora.down.weight", TEXT_ENCODER, "a.self_attn.out_proj.lora_A.weight"),
        ("a.self_attn.to_k_lora.up.weight", TEXT_ENCODER, "a.self_attn.k_proj.lora_B.weight"),
        ("a.to_q.lora_A.weight", DENOISER, "a.to_q.lora_A.weight"),
    ],
)
def test_older_names_as_they_are_written_today(old, component, new):
    assert renamed(old, component) == new


def test_peft_configures_in_its_file_or_else_in_the_header():
    packed = {"unet.lora_alpha": 3, "unet.r": 2, "text_encoder.lora_alpha": 5}
    header = {METADATA_KEY: json.dumps(packed)}
    assert recorded_config(header) == {"lora_alpha": 3, "r": 2}
    assert recorded_config(header, component=TEXT_ENCODER) == {"lora_alpha": 5}
    assert recorded_config(header, {"lora_alpha": 7}) == {"lora_alpha": 7}
    assert recorded_config({}) == {}


def lora(**ranks) -> LoRA:
    halves = {f"{name}.lora_A.weight": torch.zeros(rank, 4) for name, rank in ranks.items()}
    return LoRA(
        halves | {f"{name}.lora_B.weight": torch.zeros(4, rank) for name, rank in ranks.items()}, source="mine"
    )


@pytest.mark.parametrize(
    ("config", "alphas", "scales"),
    [
        ({}, {}, {"a": 1.0, "b": 1.0, "c": 1.0}),  # the rank is the alpha
        ({"lora_alpha": 8}, {}, {"a": 4.0, "b": 4.0, "c": 2.0}),
        ({"lora_alpha": 8, "use_rslora": True}, {}, {"a": 8 / 2**0.5, "b": 8 / 2**0.5, "c": 4.0}),
        ({"lora_alpha": 8, "alpha_pattern": {"^c": 2}}, {}, {"a": 4.0, "b": 4.0, "c": 0.5}),
        ({"lora_alpha": 8}, {"a": 6.0, "b": 6.0}, {"a": 3.0, "b": 3.0, "c": 1.0}),  # kohya's own come first
    ],
)
def test_the_scale_of_each_module(config, alphas, scales):
    read = lora(a=2, b=2, c=4)
    set_scale(read, config, alphas)
    assert read.scales() == pytest.approx(scales)


@pytest.mark.parametrize("keys", [["unet.a.lora_magnitude_vector"], ["lora_unet_a.dora_scale"]])
def test_a_dora_by_its_keys_or_its_configuration(keys):
    check_no_dora("mine", ["unet.a.lora_A.weight"], {"use_dora": False})
    with pytest.raises(ValueError, match="mine is a DoRA; only plain LoRA is supported"):
        check_no_dora("mine", keys)
    with pytest.raises(ValueError, match="mine is a DoRA; only plain LoRA is supported"):
        set_scale(lora(a=2), {"use_dora": True})


def test_half_a_pair():
    cut = lora(a=2, b=2)
    cut.check_pairs()
    del cut.tensors["b.lora_B.weight"]
    with pytest.raises(ValueError, match="mine is incomplete: 1 of its 2 modules have only one of .* such as 'b'"):
        cut.check_pairs()
