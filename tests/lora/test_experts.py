"""Pairs of LoRAs, told by names and settings; `tests/pipelines/test_wan_a14b.py` samples with them."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm.location import WEIGHTS_NAME, Location
from diffusers_mcm.lora import PAIR_NAMES, LoRA, find_pair, read_lora, read_loras, write_lora_pair
from diffusers_mcm.lora.experts import (
    as_pair,
    check_alike,
    expert_in_name,
    expert_of,
    for_expert,
    pair_of,
)
from diffusers_mcm.settings import Settings


def lora(value=1.0, source="the LoRA", **settings):
    tensors = {f"blocks.0.attn1.to_q.lora_{half}.weight": torch.full((2, 2), float(value)) for half in "AB"}
    return LoRA(tensors, source=source, settings=Settings(**settings), scheduler_config={"shift": 5.0})


def of(pair):
    return [(each.settings.expert, float(next(iter(each.tensors.values())).mean())) for each in pair]


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model.safetensors", "high_noise"),
        ("wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step.safetensors", "low_noise"),
        ("Wan2.2-T2V-A14B-4steps-lora_HIGH_fp16.safetensors", "high_noise"),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", "high_noise"),
        ("yellow_flowers_highlights.safetensors", None),
        ("high_and_low.safetensors", None),
        ("folder/high_noise/Wan-LowNoise.safetensors", "low_noise"),
        ("low_rank_high_noise.safetensors", "high_noise"),
        ("lowvram_highres.safetensors", None),
        ("from_high_to_low.safetensors", None),
        ("some_style_HIGH.safetensors", "high_noise"),
        ("some_style_low_v1.1_rank64-000010.safetensors", "low_noise"),
        ("low_poly_style.safetensors", None),
        ("High-Contrast.safetensors", None),
        ("folder_of_wan2.2/low_light.safetensors", None),
        (WEIGHTS_NAME, None),
    ],
)
def test_experts_in_the_names_of_files(name, expert):
    assert expert_in_name(name) == expert
    assert expert_of(lora(source=name)) == expert and expert_of(lora(source=name, expert="low_noise")) == "low_noise"


def test_a_pair_is_ordered_by_what_is_said_of_it():
    high, low = lora(1, expert="high_noise"), lora(2, expert="low_noise")
    expected = [("high_noise", 1.0), ("low_noise", 2.0)]
    for given in ((high, low), (low, high), (lora(1), lora(2)), (lora(1), low), (low, lora(1)), (high, lora(2))):
        assert of(as_pair(given)) == expected
    assert of(as_pair((lora(2, "low.safetensors"), lora(1)))) == expected
    with pytest.raises(
        ValueError, match="Both LoRAs are for the low_noise expert, a and b: a pair is one for each of"
    ):
        as_pair((lora(source="a", expert="low_noise"), lora(source="b", expert="low_noise")))


def test_a_pair_is_written_and_found_and_read(tmp_path):
    (tmp_path / WEIGHTS_NAME).touch()
    write_lora_pair(tmp_path, {"high_noise": lora(1), "low_noise": lora(2)}, "transformer")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PAIR_NAMES.values())
    location = Location.of(tmp_path)
    assert [each.weight_name for each in find_pair(location)] == list(PAIR_NAMES.values())
    read = read_loras(tmp_path)
    assert of(read) == [("high_noise", 1.0), ("low_noise", 2.0)] and read[1].scheduler_config == {"shift": 5.0}
    assert of(read_loras(tmp_path, weight_name=list(PAIR_NAMES.values())[::-1])) == of(read)
    one = read_loras(tmp_path / PAIR_NAMES["low_noise"])
    assert of([one]) == [("low_noise", 2.0)]
    Settings(base_model="wan-a14b", expert="high_noise").write(tmp_path)
    again = read_lora(tmp_path, weight_name=PAIR_NAMES["low_noise"])
    assert (again.settings.base_model, again.settings.expert) == ("wan-a14b", "low_noise")


def test_what_is_no_pair(tmp_path):
    here = Location.of(tmp_path)
    assert find_pair(here) is None
    (tmp_path / "high_noise.safetensors").touch()
    assert find_pair(here) is None
    (tmp_path / "low_noise.safetensors").touch()
    assert find_pair(here) is not None and find_pair(Location.of(tmp_path, weight_name="x.safetensors")) is None
    (tmp_path / "low_noise_v2.safetensors").touch()
    with pytest.raises(
        ValueError, match="several files for the low_noise expert in .*: low_noise.saf.*, low_noise_v2"
    ):
        find_pair(here)
    (tmp_path / PAIR_NAMES["low_noise"]).touch()  # the usual name counts more than others
    assert find_pair(here)[1].weight_name == PAIR_NAMES["low_noise"]
    (tmp_path / WEIGHTS_NAME).touch()
    assert find_pair(here) is None
    assert pair_of({}) is None and pair_of(lora()) is None
    with pytest.raises(ValueError, match=r"one LoRA for each of two experts, \(high, low\); got \['a', 'b', 'c'\]"):
        pair_of(["a", "b", "c"])


def test_the_expert_is_of_the_settings():
    settings = for_expert(lora(base_model="wan-a14b"), "low_noise").settings
    assert (settings.base_model, settings.expert) == ("wan-a14b", "low_noise")


def test_the_prefix_of_the_second_transformer_is_the_low_noise_expert(tmp_path):
    names = {"high_noise": (1, "transformer"), "low_noise": (2, "transformer_2")}
    keys = {
        expert: {f"{name}.{key}": each for key, each in lora(i).tensors.items()} for expert, (i, name) in names.items()
    }
    save_file(keys["low_noise"], tmp_path / "low.safetensors")
    save_file(keys["high_noise"] | keys["low_noise"], tmp_path / "both.safetensors")
    assert of([read_lora(tmp_path / "low.safetensors")]) == [("low_noise", 2.0)]
    assert of([read_loras(tmp_path / "low.safetensors")]) == [("low_noise", 2.0)]
    assert of(read_loras(tmp_path / "both.safetensors")) == [("high_noise", 1.0), ("low_noise", 2.0)]
    with pytest.raises(ValueError, match="holds LoRAs for both experts of a Wan that has two .*one was expected"):
        read_lora(tmp_path / "both.safetensors")


def test_halves_that_are_no_pair():
    high = lora(source="a", base_model="wan-a14b", boundary=0.875)
    check_alike(high, lora(source="b"))
    with pytest.raises(ValueError, match="of one model, with the same boundary; got 0.875 of a and 0.9 of b"):
        check_alike(high, lora(source="b", boundary=0.9))
    with pytest.raises(ValueError, match="of one model, with the same base_model; got wan-a14b of a and wan of b"):
        check_alike(high, lora(source="b", base_model="wan"))
