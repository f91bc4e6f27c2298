"""The few-step models of others: told by their names, and sampled as their makers say; never with their weights."""

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from diffusers_mcm import (
    MCMFlowScheduler,
    MCMPipeline,
    MCMScheduler,
    ModelScopeMCMPipeline,
    WanA14BMCMPipeline,
    WanTI2VMCMPipeline,
)
from diffusers_mcm.cli import main
from diffusers_mcm.commands import generate as command
from diffusers_mcm.files import sha256
from diffusers_mcm.lora import PAIR_NAMES
from diffusers_mcm.pipelines.few_step import AUTO, FEW_STEP, few_step_named, recognised
from diffusers_mcm.video_io import read_metadata
from tests.pipelines.hooks import record_calls
from tests.tiny import SCHEDULER, tiny_components
from tests.tiny_wan import BOUNDARY, SIZE, save_wan_base, tiny_wan_transformer, wan_components
from tests.wan_loras import (
    ALPHA,
    as_keys,
    original_file,
    random_differences,
    random_tensors,
    sample,
    wan_pipeline,
    write,
)

NAMES = {
    "lightx2v/Wan2.1-Distill-Loras": "lightx2v",
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": "lightx2v",
    "loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "lightx2v",
    "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors": "lightx2v",
    "lightx2v/Wan2.2-Lightning": "wan2.2-lightning",
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors": "wan2.2-lightning",
    "lightx2v/Wan2.2-Distill-Loras": "wan2.2-lightning",
    "Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors": "wan2.2-lightning",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan",
    "FastVideo/FastWan2.1-T2V-14B-Diffusers": "fastwan",
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan-5b",
    "worstcoder/rcm-Wan": "rcm",
    "rCM_Wan2.1_T2V_14B_480p.safetensors": "rcm",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": None,
    "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step.safetensors": None,  # makes pictures move
    "arcmotion.safetensors": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_tells(name):
    assert recognised([name]) == [NAMES[name]] * (NAMES[name] is not None)


def test_a_folder_above_the_file_tells_nothing(tmp_path):
    assert recognised([tmp_path / "fastwan2.1" / "loras" / "style.safetensors"]) == []
    lora = tmp_path / "lightx2v" / "lora.safetensors"
    assert few_step_named(AUTO, [None, lora]) is few_step_named("lightx2v") is FEW_STEP["lightx2v"]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("lcm", [], "expected the settings of one of auto, lightx2v, .*, got 'lcm'"),
        (
            AUTO,
            ["my.safetensors"],
            "expected a name by which one of lightx2v, .* my.safetensors, which tells none",
        ),
        (AUTO, ["fastwan2.1", "rcm"], "got fastwan2.1 and rcm, which tells several: fastwan, rcm"),
        (AUTO, [None], "got none, which tells none. Name the settings themselves"),
    ],
)
def test_a_name_that_tells_nothing(name, files, message):
    with pytest.raises(ValueError, match=message):
        few_step_named(name, files)


def test_the_timesteps_are_those_of_the_makers():
    assert FEW_STEP["fastwan"].timesteps == FEW_STEP["fastwan-5b"].timesteps == (1000, 757, 522)
    sigmas = [80, math.tan(1.5), math.tan(1.4), math.tan(1.0)]  # of diffusion, x_0 + σ ε
    assert FEW_STEP["rcm"].timesteps == pytest.approx([1000 * sigma / (1 + sigma) for sigma in sigmas])
    assert [round(t) for t in FEW_STEP["rcm"].timesteps] == [988, 934, 853, 609]


def pipeline_of(kind):
    """A tiny one of a base model with one expert."""
    if kind == "wan":
        return wan_pipeline()
    components = wan_components(kind) | dict(scheduler=MCMFlowScheduler(stochastic=False))
    return WanTI2VMCMPipeline(**components, height=32, width=32, num_frames=5)


@pytest.mark.parametrize("name", [name for name, row in FEW_STEP.items() if row.boundary is None])
def test_the_settings_reach_the_sampler(name, caplog):
    row = FEW_STEP[name]
    pipe = pipeline_of(row.kind)
    row.set_up(pipe)
    config = pipe.scheduler.config
    assert (config.shift, config.stochastic, pipe.sampling_default("num_inference_steps")) == (
        *(row.shift, row.stochastic),
        row.steps,
    )
    shape = (1, 16, 2, 4, 4) if row.kind == "wan" else (1, 48, 2, 2, 2)
    pipe("a red ring", latents=torch.zeros(shape), output_type="latent")  # nothing said of steps or timesteps
    on_the_grid = [1000, 937.5, 2500 / 3, 625]
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(list(row.timesteps or on_the_grid))
    pipe.scheduler.set_timesteps(timesteps=list(row.timesteps or on_the_grid))
    assert not caplog.records  # of points that no student learnt


def test_lightx2vs_steps_are_eulers(tmp_path):
    """Its 1000, 750, 500, 250 of a grid without shift, shifted by 5; a file of its layout, in diffusers' pipeline."""
    file = write(tmp_path / "lightx2v.safetensors", original_file(random_tensors()))
    pipe = wan_pipeline()
    theirs = WanPipeline(**pipe.components)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    set_timesteps = theirs.scheduler.set_timesteps
    theirs.scheduler.set_timesteps = lambda steps, device: set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], device=device)
    theirs.load_lora_weights(file)
    video = sample(theirs, num_inference_steps=4)
    theirs.unload_lora_weights()
    pipe.load_lora_weights(file)
    FEW_STEP["lightx2v"].set_up(pipe)
    torch.testing.assert_close(sample(pipe, num_inference_steps=None), video, rtol=0, atol=1e-5)


def test_what_they_are_not_for():
    other = ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER)))
    with pytest.raises(
        ValueError, match=r"FastWan 2.1 T2V, 1.3B or 14B is for a wan, such as .*; this is a modelscope"
    ):
        FEW_STEP["fastwan"].set_up(other)
    for name, kind in (("wan2.2-lightning", "wan-a14b"), ("fastwan-5b", "wan-ti2v")):
        with pytest.raises(ValueError, match=f" is for a {kind}, such as .*; this is a wan. Load that one, or"):
            FEW_STEP[name].set_up(wan_pipeline())
    components = wan_components("wan-a14b") | dict(scheduler=MCMFlowScheduler(boundary=0.9))
    pipe = WanA14BMCMPipeline(**components, boundary_ratio=0.9, height=SIZE, width=SIZE, num_frames=5)
    with pytest.raises(ValueError, match="whose two experts meet at 0.875; those of this wan-a14b meet at 0.9"):
        FEW_STEP["wan2.2-lightning"].set_up(pipe)


def test_a_pair_is_sampled_with_both_experts_and_no_phases():
    """Those of Wan2.2-Lightning are students of the whole path, asked in turns."""
    components = wan_components("wan-a14b") | dict(scheduler=MCMFlowScheduler(boundary=BOUNDARY))
    pipe = WanA14BMCMPipeline(**components, boundary_ratio=BOUNDARY, height=SIZE, width=SIZE, num_frames=5)
    FEW_STEP["wan2.2-lightning"].set_up(pipe)
    assert pipe.scheduler.config.boundary is None and not pipe.scheduler.config.stochastic
    asked = record_calls(pipe, "transformer", "transformer_2")
    sample(pipe, num_inference_steps=None)
    assert asked == ["transformer"] * 2 + ["transformer_2"] * 2
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])
    with pytest.raises(ValueError, match="is for a wan, such as .*; this is a wan-a14b"):
        FEW_STEP["lightx2v"].set_up(pipe)


# --- from the command line -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_wan_base(tmp_path_factory.mktemp("wan") / "base")


def generate(base, output, *flags):
    size = ["--height", SIZE, "--width", SIZE, "--frames", 5, "--fps", 8, "--device", "cpu"]
    main([*map(str, ["generate", "a red ring", "--model", base, "-o", output, *size, *flags])])
    return read_metadata(output)


def test_a_foreign_lora_from_the_command_line(base, tmp_path):
    whole = original_file(random_tensors(), ALPHA) | as_keys(random_differences(tiny_wan_transformer()))
    file = write(tmp_path / "Wan21_T2V_14B_lightx2v_lora.safetensors", whole)
    made = generate(base, tmp_path / "a.mp4", "--lora", file, "--few_step", "auto")
    assert made["few_step"] == FEW_STEP["lightx2v"].title and made["num_inference_steps"] == 4
    assert (made["shift"], made["stochastic"], "timesteps" in made) == (5.0, False, False)
    again = generate(base, tmp_path / "b.mp4", "--lora", file)
    assert "few_step" not in again and "stochastic" not in again


def test_a_few_step_model_from_the_command_line(base, tmp_path, monkeypatch):
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    folder.symlink_to(base)
    visited = []
    original = MCMPipeline._set_timesteps

    def spy(self, request, device):
        visited.append(original(self, request, device).tolist())
        return self.scheduler.timesteps

    monkeypatch.setattr(MCMPipeline, "_set_timesteps", spy)
    made = generate(folder, tmp_path / "a.mp4", "--few_step", "auto")
    assert made["timesteps"] == [1000, 757, 522] and made["stochastic"] is True
    generate(folder, tmp_path / "b.mp4", "--few_step", "fastwan", "--steps", 2)  # then those of the shifted grid
    assert visited[0] == [1000, 757, 522] and visited[1] == pytest.approx([1000, 8000 / 9])


def test_flags_that_contradict_each_other(base, tmp_path, capsys):
    flags = ["--few_step", "rcm", "--sampler", "mcm", "-o", tmp_path / "a.mp4"]
    assert main([*map(str, ["generate", "a red ring", "--model", base, *flags])]) != 0
    assert "expected --few_step or --sampler, got both, rcm and mcm" in capsys.readouterr().err
    flags = ["--few_step", "rcm", "--shift", 3, "-o", tmp_path / "a.mp4"]
    assert main([*map(str, ["generate", "a red ring", "--model", base, *flags])]) != 0
    assert "expected --few_step or --shift, got both, rcm and 3.0" in capsys.readouterr().err


def test_wans_teacher_from_the_command_line(base, tmp_path):
    made = generate(base, tmp_path / "a.mp4", "--sampler", "unipc", "--shift", 3, "--steps", 50)
    assert (made["sampler"], made["shift"], made["num_inference_steps"]) == ("unipc", 3.0, 50)
    assert generate(base, tmp_path / "b.mp4", "--sampler", "euler")["sampler"] == "euler"


def test_wans_frames_are_decoded_in_tiles_and_not_in_chunks(base, tmp_path, capsys, monkeypatch):
    tiled = []
    monkeypatch.setattr(AutoencoderKLWan, "enable_tiling", lambda self: tiled.append(True))
    assert generate(base, tmp_path / "a.mp4", "--vae_tiling")["vae_tiling"] is True and tiled == [True]
    for flags in (["--vae_slicing"], ["--decode_chunk_size", 4]):
        command_line = ["generate", "a red ring", "--model", base, *flags, "--device", "cpu", "-o", tmp_path / "b.mp4"]
        assert main([*map(str, command_line)]) != 0
        assert "expected neither --vae_slicing nor --decode_chunk_size for a wan" in capsys.readouterr().err


# --- whole models ----------------------------------------------------------------------------------------------------
def test_a_repository_of_fastvideos_is_a_base_model(base, tmp_path):
    """Its pipeline has a class of its own; what VSA adds to the transformer, diffusers leaves out."""
    folder = shutil.copytree(base, tmp_path / "FastWan2.1-T2V-1.3B-Diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    gates = {f"blocks.{i}.to_gate_compress.weight": torch.zeros(24, 24) for i in (0, 1)}
    save_file(load_file(path) | gates, path, {"format": "pt"})
    pipe = MCMPipeline.from_pretrained(folder)
    FEW_STEP["fastwan"].set_up(pipe)
    plain = MCMPipeline.from_pretrained(base)
    FEW_STEP["fastwan"].set_up(plain)
    options = dict(num_inference_steps=None)
    frames = [sample(each, generator=torch.Generator().manual_seed(0), **options) for each in (pipe, plain)]
    assert torch.equal(*frames)


PAIR = [f"wan2.2_t2v_A14b_{half}_noise_lora_rank64_lightx2v_4step_1217.safetensors" for half in ("high", "low")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder whose own name tells nothing."""
    folder = tmp_path_factory.mktemp("loras")
    for name, scale in zip(PAIR, (1.0, -0.5)):
        tensors = {key: scale * tensor for key, tensor in random_tensors().items()}
        write(folder / name, original_file(tensors, ALPHA))
    return folder


def test_a_pair_on_the_command_line_is_recognised_by_either_name(pair, monkeypatch):
    monkeypatch.chdir(pair.parent)
    for loras in (PAIR, PAIR[::-1], [pair], [pair.name]):
        flags = [flag for lora in loras for flag in ("--lora", str(lora))]
        arguments = command.build_parser().parse_args(["x", "--model", "base", *flags, "--few_step", "auto"])
        assert command.few_step(arguments) is FEW_STEP["wan2.2-lightning"]


def test_a_foreign_pair_from_the_command_line(pair, tmp_path, capsys):
    base = save_wan_base(tmp_path / "base", "wan-a14b")
    halves = [flag for name in PAIR for flag in ("--lora", pair / name)]
    made = []
    for number, flags in enumerate(([*halves, "--few_step", "auto"], ["--lora", pair, "--few_step", "auto"], halves)):
        made.append(generate(base, tmp_path / f"{number}.mp4", *flags))
        told = f"base with {PAIR[0]} and {PAIR[1]} on cpu" if flags[1] != pair else f"base with {pair.name} on cpu"
        assert told in capsys.readouterr().err
    assert made[0]["few_step"] == made[1]["few_step"] == FEW_STEP["wan2.2-lightning"].title
    assert made[0]["lora_sha256"] == made[1]["lora_sha256"] and len(set(made[0]["lora_sha256"])) == 2
    assert (made[0]["stochastic"], made[0]["num_inference_steps"], made[0]["shift"]) == (False, 4, 5.0)
    assert "few_step" not in made[2]


def test_one_pair_of_several_in_a_folder_is_named_on_the_command_line(pair, tmp_path, capsys):
    """As in LightX2V's repository, where those that make pictures move lie beside them."""
    base, folder = save_wan_base(tmp_path / "base", "wan-a14b"), shutil.copytree(pair, tmp_path / "loras")
    for name in PAIR:
        shutil.copyfile(folder / name, folder / name.replace("t2v", "i2v"))
    both = [flag for name in PAIR for flag in ("--weight_name", name)]
    flags = ["--model", base, "--lora", folder, "-o", tmp_path / "a.mp4"]
    assert main([*map(str, ["generate", "a red ring", *flags])]) != 0
    assert "on the command line by --weight_name HIGH --weight_name LOW" in capsys.readouterr().err
    made = generate(base, tmp_path / "a.mp4", "--lora", folder, *both, "--few_step", "auto")
    assert made["few_step"] == FEW_STEP["wan2.2-lightning"].title
    assert made["lora_sha256"] == [sha256(pair / name) for name in PAIR]
    assert main([*map(str, ["convert", folder, tmp_path / "mine", "--to", "comfyui", *both])]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(PAIR_NAMES.values())
    assert main([*map(str, ["info", folder, "--json", *both])]) == 0
    out = capsys.readouterr().out
    described = json.loads(out[out.index("{\n") :])
    assert [described[half]["sha256"] for half in PAIR_NAMES] == made["lora_sha256"]
    assert main([*map(str, ["info", folder, *both, "--weight_name", "third"])]) != 0
    assert "expected --weight_name once, or twice for two experts, got it 3 times" in capsys.readouterr().err
