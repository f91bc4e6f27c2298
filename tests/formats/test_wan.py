"""LoRAs for Wan from one layout to another and back, read by diffusers' own loader, and told apart by their size."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_mcm import MCMFlowScheduler, get_base_model
from diffusers_mcm.base_models import base_model_of, base_repository_of, infer_base_model
from diffusers_mcm.formats import convert, describe
from diffusers_mcm.lora import METADATA_KEY, LoRA, load_lora_into, read_lora
from tests.tiny import save_lora
from tests.tiny_wan import tiny_wan_transformer
from tests.wan_loras import (
    ALPHA,
    LORA_TENSORS,
    RANK,
    WAN,
    as_keys,
    diffusers_file,
    musubi_file,
    original,
    original_file,
    peft_file,
    random_differences,
    sample,
    sums,
    wan_pipeline,
    write,
)

WIDTHS = {
    1536: ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    5120: ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    3072: ("wan-ti2v", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
}


tensors = LORA_TENSORS


@pytest.fixture
def ours(tensors, tmp_path):
    """The folder that a training leaves, with a scale of 1/8, for a student of shift 3."""
    transformer = tiny_wan_transformer()
    load_lora_into(transformer, LoRA(tensors, alpha=ALPHA))
    options = dict(sampling=dict(num_inference_steps=2), scheduler=MCMFlowScheduler(shift=3.0))
    return save_lora(tmp_path / "ours", transformer, WAN, repository="owner/wan", training={"shift": 3.0}, **options)


def assert_same(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


# --- there and back --------------------------------------------------------------------------------------------------
def test_diffusers_to_comfyui_and_back_is_exact(ours, tmp_path):
    there = convert(ours, tmp_path / "comfyui.safetensors", "comfyui")
    assert convert(there, tmp_path / "back", "diffusers") == tmp_path / "back"
    files = ("pytorch_lora_weights.safetensors", "mcm_config.json", "scheduler/scheduler_config.json")
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (ours / name).read_bytes()
    again = convert(tmp_path / "back", tmp_path / "again.safetensors", "comfyui")
    assert again.read_bytes() == there.read_bytes()


def test_a_comfyui_file_has_the_authors_names_and_an_alpha_for_each_module(ours, tensors, tmp_path):
    path = convert(ours, tmp_path / "comfyui.safetensors", "comfyui")
    expected, written = original_file(tensors, ALPHA), load_file(path)
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert METADATA_KEY not in header  # diffusers would scale by it once more
    assert json.loads(header["mcm_scheduler"])["shift"] == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_and_bits_stay(tensors, tmp_path, dtype):
    half = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    source = write(tmp_path / "x.safetensors", original_file(half, 8.0))
    there = convert(source, tmp_path / "there.safetensors", "diffusers")
    assert_same(there, write(tmp_path / "expected.safetensors", diffusers_file(half)))
    assert_same(convert(there, tmp_path / "back.safetensors", "comfyui"), source)


@pytest.mark.parametrize("file", [musubi_file, lambda tensors, alpha: original_file(tensors, alpha, prefix="")])
def test_of_every_naming_one_comes_to_comfyui(tensors, tmp_path, file):
    source = write(tmp_path / "x.safetensors", file(tensors, ALPHA))
    path = convert(source, tmp_path / "comfyui.safetensors", "comfyui")
    assert_same(path, write(tmp_path / "expected.safetensors", original_file(tensors, ALPHA)))


def test_one_of_peft_has_a_scale_of_its_own_where_its_pattern_says_so(tensors, tmp_path):
    write(tmp_path / "adapter_model.safetensors", peft_file(tensors))
    config = {"r": RANK, "lora_alpha": 2.0, "alpha_pattern": {r"blocks.1.ffn.net.2": 6.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written = load_file(convert(tmp_path, tmp_path / "comfyui.safetensors", "comfyui"))
    alphas = {key: float(tensor) for key, tensor in written.items() if key.endswith(".alpha")}
    assert alphas.pop("diffusion_model.blocks.1.ffn.2.alpha") == 6.0 and set(alphas.values()) == {2.0}


def test_differences_go_to_comfyui_and_nowhere_else(tensors, tmp_path):
    differences = random_differences(tiny_wan_transformer())
    source = write(tmp_path / "x.safetensors", original_file(tensors, ALPHA) | as_keys(differences))
    assert_same(convert(source, tmp_path / "again.safetensors", "comfyui"), source)
    for to, where in (("diffusers", "d.safetensors"), ("peft", "p")):
        with pytest.raises(
            ValueError, match=r"adds to 14 parameters besides its LoRA .*diff_b.*layout has no names for"
        ):
            convert(source, tmp_path / where, to)
        assert not (tmp_path / where).exists()
    about = describe(source)
    assert (about["differences"], about["targets"], about["alpha"], about["layout"]) == (14, 20, ALPHA, "comfyui")


def test_layouts_that_are_for_other_models(ours, tmp_path):
    with pytest.raises(
        ValueError, match="0 spatial and 20|20 spatial and 0 motion modules.*ComfyUI reads Wan's in the"
    ):
        convert(ours, tmp_path / "x.safetensors", "kohya")
    lora = LoRA({f"mid_block.x.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"})
    from diffusers_mcm.lora.layouts import comfyui_tensors

    with pytest.raises(
        ValueError, match="has 1 modules that are none of Wan's, such as 'mid_block.x'; the layout comfy"
    ):
        comfyui_tensors(lora)


# --- what they do ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_diffusers_own_pipeline_makes_the_same_of_it(ours, tmp_path, to):
    path = convert(ours, tmp_path / "x.safetensors", to)
    pipe = wan_pipeline()
    theirs = WanPipeline(**pipe.components)
    pipe.load_lora_weights(path)
    video = sample(pipe)
    pipe.unload_lora_weights()
    theirs.load_lora_weights(path)
    torch.testing.assert_close(sample(theirs), video, rtol=0, atol=1e-6)


def test_what_comfyui_adds_to_the_weights_is_the_whole_lora(ours, tensors, tmp_path):
    """Its rule, from its sources: for each module `W + strength · alpha / r · up @ down`, or `W + diff`."""
    file = load_file(convert(ours, tmp_path / "x.safetensors", "comfyui"))
    fused = dict(sums(tensors, scale=ALPHA / RANK).transformer.named_parameters())
    base, used = dict(tiny_wan_transformer().named_parameters()), set()
    for module in {key.rpartition(".lora_")[0] for key in tensors}:
        name = f"diffusion_model.{original(module)}"
        up, down, alpha = (file[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        weight = base[f"{module}.weight"] + alpha.item() / down.shape[0] * up @ down
        torch.testing.assert_close(weight, fused[f"{module}.weight"], rtol=0, atol=1e-6)
        used |= {f"{name}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert used == file.keys()


# --- what they are ---------------------------------------------------------------------------------------------------
def of_width(width, rank=1):
    halves = {"A": torch.zeros(rank, width), "B": torch.zeros(width, rank)}
    return {f"blocks.0.attn1.to_q.lora_{half}.weight": tensor for half, tensor in halves.items()}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_base_model_of_a_lora_without_settings_is_told_by_its_size(tmp_path, width):
    path = write(tmp_path / "x.safetensors", original_file(of_width(width)))
    lora = read_lora(path)
    assert (base_model_of(lora).name, base_repository_of(lora)) == WIDTHS[width]
    about = describe(path)
    assert (about["base_model"], about["base_model_repository"]) == WIDTHS[width]
    written = read_lora(convert(path, tmp_path / "d.safetensors", "diffusers"))
    assert (written.settings.base_model, written.settings.base_model_repository) == WIDTHS[width]


def test_the_feed_forward_tells_the_size_too_and_an_unknown_one_is_the_smallest(tmp_path):
    ffn = {key.replace("attn1.to_q", "ffn.net.0.proj"): tensor for key, tensor in of_width(3072).items()}
    assert base_model_of(LoRA(ffn)).name == "wan-ti2v"
    assert base_repository_of(LoRA(of_width(24))) == WAN.default_repository
    assert infer_base_model(lora_modules=["blocks.0.attn1.to_q"]) is get_base_model("wan")


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("comfyui", lambda tensors: original_file(tensors, ALPHA)),
        ("kohya", lambda tensors: musubi_file(tensors, ALPHA)),
        ("original", lambda tensors: original_file(tensors, ALPHA, prefix="")),
        ("several", lambda tensors: musubi_file(tensors, ALPHA) | original_file(of_width(24, RANK))),
        ("diffusers", diffusers_file),
    ],
)
def test_every_layout_is_described(tensors, tmp_path, layout, file):
    content = {key: tensor for key, tensor in file(tensors).items()}
    if layout == "several":
        content = {key: each for key, each in content.items() if "blocks_0_self_attn_q" not in key}
    about = describe(write(tmp_path / "high_noise_model.safetensors", content))
    assert (about["layout"], about["base_model"], about["expert"]) == (layout, "wan-a14b", "high_noise")
    assert (about["rank"], about["targets"]) == (RANK, 20)
    assert about["alpha"] == (None if layout == "diffusers" else ALPHA)
    assert about["modules"]["to_q"] == 4 and about["modules"]["ffn.net.2"] == 2
    assert about["settings"]["shift"] == 5.0 and not about["settings_recorded"]
