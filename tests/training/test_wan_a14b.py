"""Distilling the experts of Wan 2.2 A14B, each by itself, and sampling with both."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, WanA14BMCMPipeline
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import Trainer, train
from tests.tiny_wan import BOUNDARY, save_wan_base

from .test_distributed import DOUBLE, train_in_two_processes
from .world import (
    CAPTIONS,
    SPLIT,
    assert_same_training,
    double_precision,
    flags_of,
    flatten,
    stop_in_step_two,
    tiny_config,
)

EXPERTS = ("high_noise", "low_noise")
PLAIN = dict(motion="raw", lambda_real=1.0, lambda_adv=0.0, image_data=None)


@pytest.fixture(scope="module")
def a14b(world, tmp_path_factory):
    """The flags of a tiny world with Wan 2.2 A14B as the teacher."""
    base = save_wan_base(tmp_path_factory.mktemp("a14b") / "base", "wan-a14b")
    return world | dict(pretrained_teacher_model=str(base))


def expert_config(flags, output_dir, expert="high_noise", **options):
    sizes = dict(num_frames=5, height=16, width=16, train_batch_size=2, expert=expert)
    return tiny_config(flags, output_dir, **sizes | options)


def test_from_videos_to_a_pair_that_samples(a14b, tmp_path):
    folders = {}
    for expert in EXPERTS:
        prompts = (CAPTIONS[0],) if expert == "high_noise" else ()
        options = dict(gradient_checkpointing=True, validation_prompts=prompts, shift=8.0, frame_interval=None)
        config = parse_config(flags_of(expert_config(a14b, tmp_path / expert, expert, **options)))
        out = folders[expert] = train(config)
        weights = load_file(out / "pytorch_lora_weights.safetensors")
        assert all(key.startswith("transformer.blocks.") for key in weights)
        assert all(tensor.any() for key, tensor in weights.items() if ".lora_B." in key)
        said = json.loads((out / "mcm_config.json").read_text())
        assert (said["base_model"], said["expert"], said["boundary"]) == ("wan-a14b", expert, BOUNDARY)
        assert said["training"]["expert"] == expert and (out / "README.md").is_file()
        ends = tuple(said["training"][f"guidance_{end}"] for end in ("min", "max"))
        assert ends == {"high_noise": (2.0, 5.0), "low_noise": (1.0, 4.0)}[expert]
        scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        own = dict(num_train_timesteps=1000, original_inference_steps=48, shift=8.0, stochastic=True)
        own |= dict(boundary=BOUNDARY, trained_timesteps=None)
        assert {key: value for key, value in scheduler.items() if key[0] != "_"} == own
    assert (folders["high_noise"] / "validation" / "step-000002" / "00.mp4").is_file()
    pipe = MCMPipeline.from_pretrained(tuple(folders.values()))
    assert type(pipe) is WanA14BMCMPipeline and type(pipe.scheduler) is MCMFlowScheduler
    assert pipe.get_list_adapters() == {"transformer": ["mcm"], "transformer_2": ["mcm"]}
    pipe.set_progress_bar_config(disable=True)

    def sample(**options):
        return pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), **options).frames

    video = sample()
    assert video.shape == (1, 5, 16, 16, 3) and (video != sample(lora_scale=0.0)).any()
    for weights in ({"transformer": 0.0}, {"transformer_2": 0.0}):
        pipe.set_adapters("mcm", weights)
        assert (video != sample()).any()
    with pytest.raises(ValueError, match="is for the low_noise expert, and there is no LoRA for the other one"):
        MCMPipeline.from_pretrained(folders["low_noise"])
    for expert in EXPERTS:  # a second stage goes on with its own half, of the pair's folder too
        pipe.save_mcm_lora(tmp_path / "pair")
        more = dict(pretrained_lora=str(tmp_path / "pair"), **PLAIN)
        begun = Trainer(expert_config(a14b, tmp_path / f"more {expert}", expert, **more)).networks.state_dict()["lora"]
        trained = load_file(folders[expert] / "pytorch_lora_weights.safetensors")
        assert all(torch.equal(begun[key.removeprefix("transformer.")], trained[key]) for key in trained)
    wrong = dict(pretrained_lora=str(folders["low_noise"]), **PLAIN)
    with pytest.raises(ValueError, match="is for the low_noise expert, and --expert is high_noise"):
        Trainer(expert_config(a14b, tmp_path / "wrong", **wrong))


@pytest.mark.parametrize("expert", EXPERTS)
def test_only_the_expert_is_loaded_and_it_is_trained_in_its_phase_alone(a14b, tmp_path, expert, monkeypatch):
    trainer = Trainer(expert_config(a14b, tmp_path, expert, timesteps="visited"))
    pipeline, path = trainer.networks.pipeline, trainer.networks.student.path
    names = dict(zip(EXPERTS, ("transformer", "transformer_2")))
    assert [getattr(pipeline, name) is None for name in names.values()] == [each != expert for each in EXPERTS]
    assert trainer.networks.student.denoiser is getattr(pipeline, names[expert])
    teacher = MCMPipeline.from_pretrained(a14b["pretrained_teacher_model"])
    key = "blocks.1.ffn.net.2"
    own = pipeline.denoiser.get_submodule(key).base_layer.weight
    assert torch.equal(own, getattr(teacher, names[expert]).get_submodule(key).weight)
    ends = (1.0, BOUNDARY) if expert == "high_noise" else (BOUNDARY, 0.0)
    assert (path.start, path.end) == ends
    drawn, asked = [], []
    draw, denoise = trainer.draw, type(pipeline.base_model).denoise
    trainer.draw = lambda batch: (drawn.append(draw(batch)), drawn[-1])[1]

    def watched(self, denoiser, latents, timesteps, text):
        asked.append(timesteps)
        return denoise(self, denoiser, latents, timesteps, text)

    monkeypatch.setattr(type(pipeline.base_model), "denoise", watched)
    trainer.train()
    times, all_times = torch.cat([each.timestep for each in drawn]), torch.cat(asked)
    assert ((times > 1000 * ends[1]) & (times <= 1000 * ends[0])).all()
    # The target is where the teacher's step lands, at the end of the phase, too.
    assert ((all_times >= 1000 * ends[1]) & (all_times <= 1000 * ends[0])).all()
    grid = path.solver_timesteps(48)
    assert set(trainer.timesteps.tolist()) == set(grid.tolist()) and len(trainer.timesteps) > len(grid)


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_resumed_run_is_bit_identical(a14b, tmp_path, expert):
    options = dict(max_train_steps=2)
    trainer = Trainer(expert_config(a14b, tmp_path / "whole", expert, **options))
    trainer.train()
    parts = tmp_path / "parts"
    stop_in_step_two(expert_config(a14b, parts, expert, checkpointing_steps=1, **options))
    options["resume_from_checkpoint"] = "latest"
    resumed = Trainer(expert_config(a14b, parts, expert, **options))
    resumed.train()
    whole, again = flatten(trainer.state()), flatten(resumed.state())
    assert whole.keys() == again.keys() and [name for name in whole if not torch.equal(whole[name], again[name])] == []
    other = EXPERTS[expert == "high_noise"]
    with pytest.raises(ValueError, match=f"cannot be gone on with other settings: expert was {expert}, is {other}"):
        Trainer(expert_config(a14b, parts, other, **options))


@pytest.mark.parametrize("expert", EXPERTS)
def test_two_processes_equal_one_big_batch(a14b, tmp_path, expert):
    a14b = a14b | dict(video_data=str(shutil.copytree(a14b["video_data"], tmp_path / "videos")))
    with double_precision():
        one = Trainer(expert_config(a14b, tmp_path / "one", expert, **SPLIT))
        start = flatten(one.state())
        one.train()
    two = expert_config(a14b, tmp_path / "two", expert, train_batch_size=1, checkpointing_steps=2, **SPLIT)
    train_in_two_processes(two, tmp_path, DOUBLE)
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=True)


def test_a_half_precision_expert_trains_at_exact_times(a14b, tmp_path):
    trainer = Trainer(expert_config(a14b, tmp_path, "low_noise", max_train_steps=1, mixed_precision="bf16"))
    assert trainer.networks.pipeline.transformer_2.dtype == torch.bfloat16
    assert trainer.timesteps[-1] == 875 and trainer.timesteps.dtype == torch.float32
    trainer.train()


def test_a_teacher_that_was_saved_with_a_pair_is_without_it(a14b, tmp_path, caplog):
    """As any saved pipeline; here one of the two networks that the LoRAs lie on is not there."""
    pipe = MCMPipeline.from_pretrained(a14b["pretrained_teacher_model"])
    high, low = (train(expert_config(a14b, tmp_path / expert, expert, max_train_steps=1)) for expert in EXPERTS)
    pipe.load_mcm_lora((high, low))
    pipe.save_pretrained(tmp_path / "saved")
    teacher = a14b | dict(pretrained_teacher_model=str(tmp_path / "saved"))
    networks = Trainer(expert_config(teacher, tmp_path / "again", "low_noise", **PLAIN)).networks
    assert networks.pipeline.get_list_adapters() == {"transformer_2": ["default"]}
    assert "are for two experts, of which one is loaded; they are left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(expert=None),
            "A wan-a14b has two experts, each of which is distilled by itself: say which with --expert",
        ),
        (
            dict(push_to_hub=True),
            "--push_to_hub would publish half a model, the high_noise expert's. Distil both, load",
        ),
        (
            dict(expert="low_noise", validation_prompts=("a ring",)),
            "--validation_prompts: the low_noise expert finishes what the high_noise expert begins, and has no clips",
        ),
        (dict(expert="high"), "--expert must be one of high_noise, low_noise, not 'high'"),
    ],
)
def test_what_makes_no_sense_for_an_expert(a14b, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Trainer(expert_config(a14b, tmp_path, **options))


def test_a_teacher_without_experts(world, tmp_path):
    with pytest.raises(ValueError, match="--expert high_noise: a modelscope has one denoiser and no experts"):
        Trainer(tiny_config(world, tmp_path, expert="high_noise"))
