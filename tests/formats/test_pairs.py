"""The pair of LoRAs for two experts from one layout to another, and described."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_mcm import get_base_model
from diffusers_mcm.cli import main
from diffusers_mcm.formats import convert, describe
from diffusers_mcm.lora import PAIR_NAMES, read_loras, write_lora_pair
from tests.test_publish_pairs import save_half
from tests.tiny_wan import BOUNDARY
from tests.wan_loras import original_file

EXPERTS = tuple(PAIR_NAMES)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The folders that two trainings leave."""
    folder = tmp_path_factory.mktemp("halves")
    return tuple(save_half(folder / expert, expert, seed) for seed, expert in enumerate(EXPERTS))


@pytest.fixture
def pair(halves, tmp_path):
    """What `save_mcm_lora` writes."""
    write_lora_pair(tmp_path / "pair", dict(zip(EXPERTS, read_loras(halves))), "transformer")
    return tmp_path / "pair"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- there and back --------------------------------------------------------------------------------------------------
def test_to_comfyui_and_back_is_exact(pair, tmp_path):
    there = convert(pair, tmp_path / "comfyui", "comfyui")
    assert files(there).keys() == set(PAIR_NAMES.values())
    for name in PAIR_NAMES.values():
        ours, written = load_file(pair / name), load_file(there / name)
        plain = {key.removeprefix("transformer."): tensor for key, tensor in ours.items()}
        expected = original_file(plain, 2.0)
        assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    assert files(convert(there, tmp_path / "back", "diffusers")) == files(pair)
    assert files(convert(tmp_path / "back", tmp_path / "again", "comfyui")) == files(there)


def test_two_trainings_become_a_pair(halves, pair, tmp_path, capsys):
    high, low = map(str, halves)
    command = ["convert", high, low, "--to", "diffusers", str(tmp_path / "made")]
    assert main(command) == 0
    assert files(tmp_path / "made") == files(pair)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all("(diffusers: 20 modules, 40 tensors" in line for line in printed)
    assert main(command) == 2 and "exists already; choose another name" in capsys.readouterr().err
    assert main(["convert", low, high, str(tmp_path / "made"), "--to", "comfyui", "--overwrite"]) == 0  # in any order
    assert describe(tmp_path / "made")["low_noise"]["layout"] == "comfyui"
    assert main(["convert", high, low, low, str(tmp_path / "x"), "--to", "diffusers"]) == 2
    assert "A pair is one LoRA for each of two experts, (high, low)" in capsys.readouterr().err
    assert main(["convert", high, str(tmp_path / "made"), "--to", "diffusers", "--overwrite"]) == 0
    assert not set(PAIR_NAMES.values()) & files(tmp_path / "made").keys()  # nothing of the pair is left


def test_one_of_a_pair_keeps_its_expert(pair, tmp_path):
    name = PAIR_NAMES["low_noise"]
    path = convert(pair, tmp_path / "x.safetensors", "comfyui", weight_name=name)
    assert describe(path)["expert"] == "low_noise" and describe(path)["settings"]["boundary"] == BOUNDARY
    bare = tmp_path / "bare" / "x_low_noise.safetensors"
    bare.parent.mkdir()
    save_file(load_file(pair / name), bare)
    about = describe(convert(bare, tmp_path / "y.safetensors", "diffusers"))
    assert (about["base_model"], about["expert"]) == ("wan-a14b", "low_noise")
    assert about["base_model_repository"] == get_base_model("wan-a14b").default_repository


def test_where_a_pair_does_not_go(pair, halves, tmp_path):
    with pytest.raises(
        ValueError, match=r"is two files, high_noise_model.* in a folder; got a file to write. Name a f"
    ):
        convert(pair, tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(
        ValueError, match="are the pair for two experts, which is written as diffusers or comfyui, not"
    ):
        convert(pair, tmp_path / "x", "peft")
    with pytest.raises(ValueError, match="The layout 'comfyui' is a file that ends in .safetensors, got"):
        convert(halves[0], tmp_path / "x", "comfyui")
    other = save_half(tmp_path / "other", "low_noise", 1, boundary=0.9)
    with pytest.raises(ValueError, match="of one model, with the same boundary; got 0.875 of .* and 0.9 of"):
        convert((halves[0], other), tmp_path / "x", "diffusers")
    cut = shutil.copytree(pair, tmp_path / "cut") / PAIR_NAMES["low_noise"]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match="low_noise_model.safetensors is damaged"):
        convert(cut.parent, tmp_path / "x", "comfyui")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["both.safetensors", "both_low_noise.safetensors"])
def test_one_file_with_both_halves_is_a_pair(pair, tmp_path, capsys, name):
    """By its keys, whatever its name says."""
    high, low = (load_file(pair / half) for half in PAIR_NAMES.values())
    second = {key.replace("transformer.", "transformer_2."): tensor for key, tensor in low.items()}
    save_file(high | second, tmp_path / name)
    about = describe(tmp_path / name)
    assert tuple(about) == EXPERTS and about["high_noise"]["sha256"] == about["low_noise"]["sha256"]
    for expert in EXPERTS:
        told = about[expert]
        assert (told["expert"], told["base_model"], told["layout"]) == (expert, "wan-a14b", "diffusers")
        assert (told["targets"], told["tensors"], told["rank"]) == (20, 40, 2)
        assert sum(told["modules"].values()) == 20 and told["parameters"] == sum(map(torch.numel, high.values()))
    assert main(["info", str(tmp_path / name)]) == 0
    assert "low_noise:\n" in (printed := capsys.readouterr().out) and "  expert: high_noise\n" in printed
    assert main(["convert", str(tmp_path / name), str(tmp_path / "made"), "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.count("(diffusers: 20 modules, 40 tensors") == 2
    for half, expected in zip(PAIR_NAMES.values(), (high, low)):
        written = load_file(tmp_path / "made" / half)
        assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    for to, where, message in (
        ("peft", "x", f"{name} holds the pair for two experts, which is written as diffusers or comfyui, not as peft"),
        ("diffusers", "x.safetensors", "or for one of them alone convert both to a folder first, and then its file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / where, to)


# --- what they are ---------------------------------------------------------------------------------------------------
def test_a_pair_is_described_by_its_halves(pair, halves, capsys):
    about = describe(pair)
    assert tuple(about) == EXPERTS
    for expert, half in zip(EXPERTS, halves):
        alone = describe(half)
        told = about[expert]
        assert told["expert"] == alone["expert"] == expert and told["base_model"] == "wan-a14b"
        assert told["settings"] == alone["settings"]
        assert {key: told["settings"][key] for key in ("num_inference_steps", "shift", "boundary")} == dict(
            num_inference_steps=4, shift=3.0, boundary=BOUNDARY
        )
        assert told["training"]["expert"] == expert and told["file"] == str(pair / PAIR_NAMES[expert])
    assert main(["info", str(pair)]) == 0
    printed = capsys.readouterr().out
    assert "low_noise:\n" in printed and "  expert: low_noise\n" in printed
    assert printed.count("    boundary: 0.875\n") == printed.count("    shift: 3.0\n") == 2
    assert main(["info", str(halves[1])]) == 0
    assert "expert: low_noise\n" in (printed := capsys.readouterr().out) and "  num_inference_steps: 4\n" in printed
    assert main(["info", str(pair), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == about


def test_a_boundary_that_no_scheduler_tells(tmp_path):
    half = save_half(tmp_path / "half", "high_noise", 0, scheduler=None)
    settings = describe(half)["settings"]
    assert (settings["boundary"], settings["shift"]) == (BOUNDARY, 5.0)


def test_a_style_for_a_model_without_experts_is_no_half(tmp_path):
    module = "diffusion_model.blocks.0.self_attn.q.lora_"  # as wide as Wan 2.1 1.3B
    tensors = {f"{module}down.weight": torch.zeros(2, 1536), f"{module}up.weight": torch.zeros(1536, 2)}
    for name in ("pixels_low", "style"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        about = describe(tmp_path / f"{name}.safetensors")
        assert (about["base_model"], about["expert"]) == ("wan", None)
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, "diffusers")
        assert "expert" not in json.loads((tmp_path / name / "mcm_config.json").read_text())
