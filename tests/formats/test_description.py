"""What is said of a LoRA in any layout."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_mcm.formats import convert, describe
from tests.formats.world import ADAPTER, MODELSCOPE, edit_json, save_released
from tests.tiny import FEW_MODULES, save_tiny_lora


@pytest.fixture(scope="module")
def animatediff(tmp_path_factory):
    return save_released(tmp_path_factory.mktemp("lora"), "animatediff", alpha=6)


def test_a_released_lora(animatediff):
    path = animatediff / "adapter_model.safetensors"
    about = describe(animatediff)
    assert (about["layout"], about["base_model"], about["rank"], about["alpha"]) == ("peft", "animatediff", 4, 6)
    assert about["base_model_repository"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert about["tensors"] == 2 * about["targets"] == 2 * sum(about["kinds"].values())
    assert about["kinds"].keys() == {"Linear", "Conv2d"} and sum(about["modules"].values()) == about["targets"]
    assert about["modules"]["conv"] == 2 and about["modules"]["ff.net.2"] > 0
    assert (about["dtype"], about["bytes"]) == ("F32", path.stat().st_size)
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not about["settings_recorded"] and about["training"] is None
    settings = about["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["height"]) == (4, 1.0, 512)
    assert (settings["timestep_scaling"], settings["beta_schedule"]) == (4.0, "linear")
    edit_json(animatediff / "adapter_config.json", base_model_name_or_path="someone/fine-tune")
    assert describe(animatediff)["base_model_repository"] == "someone/fine-tune"
    edit_json(animatediff / "adapter_config.json", base_model_name_or_path=None)


def test_every_layout_says_the_same_of_one_lora(animatediff, hub_root, tmp_path):
    whole, about = describe(animatediff), {}
    for to, options in (("diffusers", {}), ("kohya", {}), ("motion-module", {"motion_adapter": hub_root / ADAPTER})):
        about[to] = describe(convert(animatediff, tmp_path / f"{to}.safetensors", to, **options))
        assert (about[to]["layout"], about[to]["base_model"]) == (to, "animatediff")
        assert about[to]["settings"] == whole["settings"] and about[to]["settings_recorded"]
    assert {
        key: about["diffusers"][key] for key in ("rank", "alpha", "targets", "kinds", "modules", "parameters")
    } == {key: whole[key] for key in ("rank", "alpha", "targets", "kinds", "modules", "parameters")}
    spatial = about["kohya"]
    assert (spatial["rank"], spatial["alpha"], spatial["kinds"]["Conv2d"]) == (4, 6, whole["kinds"]["Conv2d"])
    assert spatial["modules"]["conv1"] == whole["modules"]["conv1"]
    assert spatial["modules"]["to_q"] < whole["modules"]["to_q"]
    assert (about["motion-module"]["targets"], about["motion-module"]["rank"]) == (0, None)


def test_a_lora_of_ours(hub_root, tmp_path):
    options = dict(training={"motion": "learnable", "steps": 700}, rank=4, modules=FEW_MODULES)
    folder = save_tiny_lora(tmp_path, base=hub_root / MODELSCOPE, **options)
    about = describe(folder)
    assert (about["layout"], about["base_model"], about["targets"]) == ("diffusers", "modelscope", len(FEW_MODULES))
    assert about["settings_recorded"] and about["settings"]["num_inference_steps"] == 2
    assert about["settings"]["beta_schedule"] == "scaled_linear"
    assert about["training"] == {"motion": "learnable", "steps": 700}
    (folder / "mcm_config.json").unlink()  # the file itself knows
    assert describe(folder) == about


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"conv_in.weight": 2},
            "keys of no known layout .peft, diffusers, comfyui, kohya, motion-module., such as 'conv_in.we",
        ),
        ({}, "keys of no known layout .*such as 'none at all'"),
        ({"unet.x.lora_A.weight": 2}, "is incomplete: 1 of its 1 modules have only one matrix, such as 'unet.x'"),
        ({"unet.x.lora_A.weight": 2, "base_model.model.x.lora_B.weight": 2}, "no known layout"),
    ],
)
def test_what_is_no_lora(tmp_path, tensors, message):
    save_file({key: torch.zeros([2] * ndim) for key, ndim in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        describe(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("written", "told"), [("8.0", 8.0), ("None", None), ("Dynamic", None)])
def test_the_alpha_of_a_kohya_file_of_others(tmp_path, written, told):
    tensors = {f"lora_unet_x.lora_{half}.weight": torch.zeros(2, 2) for half in ("down", "up")}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_alpha": written})
    assert describe(tmp_path / "x.safetensors")["alpha"] == told


def test_a_pickle_and_a_damaged_file(tmp_path):
    for name, message in (("x.ckpt", "not a .safetensors file"), ("x.safetensors", "damaged or not a safetensors")):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(ValueError, match=message):
            describe(tmp_path / name)


@pytest.mark.parametrize("act", [describe, lambda path: convert(path, path.parent / "out", "peft")], ids=["info", ""])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (dict(config="[]"), r"mcm_config.json should be a JSON object, in braces; it is \[\]"),
        (dict(config='{"sampling": "x"}'), "`sampling` in mcm_config.json must be an object, not 'x'"),
        (dict(header={"lora_adapter_metadata": "[]"}), "lora_adapter_metadata in the header .* a JSON object"),
        (dict(header={"mcm_config": "{oops"}), "mcm_config in the header of .* is not valid JSON"),
        (dict(shapes=[(2, 3, 1), (3, 2, 1)]), r"of 'to_q' have the shapes \(2, 3, 1\) and \(3, 2, 1\)"),
        (dict(shapes=[(2, 3), (3, 4)]), r"have the shapes \(2, 3\) and \(3, 4\); expected those of a linear layer"),
        (dict(shapes=[(), ()]), r"have the shapes \(\) and \(\)"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_what_is_of_another_kind_is_told_in_a_sentence(tmp_path, act, spoil, message):
    folder = save_tiny_lora(tmp_path / "lora", base="owner/base")
    weights = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(weights)
    if "shapes" in spoil:
        tensors |= {f"unet.to_q.lora_{half}.weight": torch.zeros(shape) for half, shape in zip("AB", spoil["shapes"])}
    save_file(tensors, weights, spoil.get("header"))
    if "config" in spoil:
        (folder / "mcm_config.json").write_text(spoil["config"])
    with pytest.raises(ValueError, match=message):
        act(folder)
    assert not (tmp_path / "out").exists()
