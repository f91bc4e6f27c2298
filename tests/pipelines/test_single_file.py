"""A Stable Diffusion 1.5 in one file, as model sites offer it, under AnimateDiff's motion modules."""

import re

import pytest
import torch
from safetensors.torch import save_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline
from diffusers_mcm.location import Location
from diffusers_mcm.lora.layouts import original_name
from diffusers_mcm.pipelines.loading import read_base_index
from tests.tiny import (
    NUM_FRAMES,
    SIZE,
    save_tiny_stable_diffusion,
    tiny_components,
    tiny_image_unet,
    tiny_motion_adapter,
)

OUTSIDE_THE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_THE_VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{1 - int(match[1])}.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{1 - int(match[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)


def original_checkpoint(unet, vae, text_encoder) -> dict:
    """The three networks under the names of Stable Diffusion's first code; two levels, as in `tests.tiny`."""
    tensors = {}
    for key, tensor in unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        name = OUTSIDE_THE_BLOCKS.get(module) or original_name(module, unet)
        name = re.sub(r"\.norm1$", ".in_layers.0", name) if ".resnets." in module else name
        name = re.sub(r"\.norm2$", ".out_layers.0", name) if ".resnets." in module else name
        tensors[f"model.diffusion_model.{name}.{kind}"] = tensor
    for key, tensor in vae.state_dict().items():
        for pattern, new in IN_THE_VAE:
            key = re.sub(pattern, new, key)
        tensors[f"first_stage_model.{key}"] = tensor
    for key, tensor in text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Stable Diffusion as a folder, and another one in a file."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_stable_diffusion(folder / "sd")
    components = tiny_components(seed=5)
    networks = [tiny_image_unet(seed=5), components["vae"], components["text_encoder"]]
    save_file(original_checkpoint(*networks), folder / "dreamy.safetensors")
    save_tiny_stable_diffusion(folder / "same", seed=5)
    return folder


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_frames=NUM_FRAMES, height=SIZE, width=SIZE, output_type="pt", num_inference_steps=2)
    return pipe("a red ring", generator=torch.Generator().manual_seed(0), **options).frames


def test_a_checkpoint_is_the_same_model_as_its_folder(world):
    """No weight of the folder with the configurations is used, and the betas are the motion modules'."""
    options = dict(motion_adapter=tiny_motion_adapter())
    expected = MCMPipeline.from_pretrained(world / "same", **options)
    found = MCMPipeline.from_pretrained(world / "dreamy.safetensors", config=world / "sd", **options)
    assert found.scheduler.config == expected.scheduler.config and found.scheduler.config.beta_schedule == "linear"
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (found, expected))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    again = AnimateDiffMCMPipeline.from_single_file(world / "dreamy.safetensors", config=world / "sd", **options)
    assert torch.equal(sample(again), sample(expected))


def test_options_of_a_folder_are_taken_for_a_file(world, caplog):
    path, options = world / "dreamy.safetensors", dict(config=world / "sd", motion_adapter=tiny_motion_adapter())
    same = dict(low_cpu_mem_usage=True, use_safetensors=None, device_map=None)
    pipe = MCMPipeline.from_pretrained(path, **options, **same, num_inference_steps=2)
    assert pipe.config.num_inference_steps == 2 and "passed over" not in caplog.text
    MCMPipeline.from_pretrained(path, **options, safety_checker=None)
    assert "safety_checker is passed over, which AnimateDiffMCMPipeline does not take" in caplog.text
    with pytest.raises(ValueError, match="`device_map` is for models in a folder"):
        MCMPipeline.from_pretrained(path, **options, device_map="balanced")


def test_a_lora_says_where_the_configurations_are(world, tmp_path):
    adapter = tiny_motion_adapter()
    adapter.save_pretrained(tmp_path / "motion")
    trained = MCMPipeline.from_pretrained(world / "sd", motion_adapter=adapter)
    name = "down_blocks.0.motion_modules.0.proj_in"
    size = trained.unet.get_submodule(name).weight.shape
    trained.load_lora_weights(
        {f"unet.{name}.lora_A.weight": torch.ones(1, size[1]), f"unet.{name}.lora_B.weight": torch.ones(size[0], 1)}
    )
    trained.save_mcm_lora(tmp_path / "lora")
    pipe = MCMPipeline.from_pretrained(
        tmp_path / "lora", base_model=world / "dreamy.safetensors", motion_adapter=tmp_path / "motion"
    )
    same = tiny_image_unet(seed=5).state_dict()
    assert torch.equal(pipe.unet.conv_in.weight, same["conv_in.weight"])


def test_what_is_wrong_with_a_checkpoint(world, tmp_path, monkeypatch):
    path, key = tmp_path / "x.safetensors", "model.diffusion_model.input_blocks.0.0.weight"
    options = dict(config=world / "sd", motion_adapter=tiny_motion_adapter())
    save_file({key: torch.zeros(8, 4, 3, 3)}, path)
    with pytest.raises(
        ValueError, match="(?s)is a single-file checkpoint, and .*make a folder of the file: python -c"
    ):
        MCMPipeline.from_pretrained(path, **options)
    save_file({key: torch.zeros(8, 9, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint of another model \(inpainting\)"):
        MCMPipeline.from_pretrained(path, **options)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="its configurations cannot be read from owner/nothing"):
        MCMPipeline.from_pretrained(world / "dreamy.safetensors", **options | dict(config="owner/nothing"))
    save_file({"something": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="the file is no checkpoint of a whole model"):
        read_base_index(Location.of(path))
    path.with_suffix(".ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="x.ckpt of .* is not a .safetensors file; pickled weights are not read"):
        MCMPipeline.from_pretrained(path.with_suffix(".ckpt"))
    with pytest.raises(ValueError, match="x.ckpt is not a .safetensors file; pickled weights are not read"):
        read_base_index(Location.of(path.with_suffix(".ckpt")))
