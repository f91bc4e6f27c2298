"""Distilling a base model that differs in everything, whose files are not the package's."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import BASE_MODELS
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.loop import Trainer, train
from tests.base_models.flow_model.pipeline import FlowMCMPipeline
from tests.base_models.flow_model.tiny import save_flow_base

from .world import CAPTIONS, flags_of, flatten, stop_in_step_two, tiny_config

NUM_FRAMES = 5  # two of the latents


@pytest.fixture(scope="module")
def flow(world, tmp_path_factory):
    folder = save_flow_base(tmp_path_factory.mktemp("flow") / "base")
    return world | dict(pretrained_teacher_model=str(folder), num_solver_steps=48)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(BASE_MODELS, "flow", FlowMCMPipeline.base_model)


def test_from_videos_to_a_lora_that_samples(flow, tmp_path):
    options = dict(num_frames=NUM_FRAMES, gradient_checkpointing=True, validation_prompts=(CAPTIONS[0],))
    out = train(parse_config(flags_of(tiny_config(flow, tmp_path / "lora", **options, fps=16))))
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(tensor.any() for key, tensor in weights.items() if ".lora_B." in key)
    assert str(tmp_path) not in (out / "mcm_config.json").read_text()
    config = json.loads((out / "mcm_config.json").read_text())
    assert config["base_model"] == config["training"]["base_model"] == "flow"
    assert [config["training"][f"guidance_{end}"] for end in ("min", "max")] == [2.0, 4.0]
    assert (out / "validation" / "step-000002" / "00.mp4").is_file() and (out / "README.md").is_file()
    pipe = MCMPipeline.from_pretrained(out)
    assert type(pipe) is FlowMCMPipeline
    scheduler = dict(num_train_timesteps=1000, original_inference_steps=48, shift=5.0)
    assert {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"} == scheduler
    pipe.set_progress_bar_config(disable=True)
    with_lora, without = (
        pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), lora_scale=scale).frames for scale in (1.0, 0.0)
    )
    assert with_lora.shape == (1, NUM_FRAMES, 16, 16, 3) and (with_lora != without).any()


def test_the_model_says_what_guidance_leads_away_from(flow, tmp_path):
    trainer = Trainer(
        tiny_config(flow, tmp_path, num_frames=NUM_FRAMES, max_train_steps=1, lambda_adv=0.0, image_data=None)
    )
    encoded, encode = [], trainer.networks.text.row
    trainer.networks.text.row = lambda caption: (encoded.append(caption), encode(caption))[1]
    trainer.train()
    assert set(encoded) == {"still", *CAPTIONS}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_bit_identical(flow, tmp_path, precision):
    options = dict(num_frames=NUM_FRAMES, max_train_steps=2, train_batch_size=2, mixed_precision=precision)
    trainer = Trainer(tiny_config(flow, tmp_path / "whole", **options))
    trainer.train()

    parts = tmp_path / "parts"
    stop_in_step_two(tiny_config(flow, parts, checkpointing_steps=1, **options))
    resumed = Trainer(tiny_config(flow, parts, resume_from_checkpoint="latest", **options))
    resumed.train()
    whole, again = flatten(trainer.state()), flatten(resumed.state())
    assert whole.keys() == again.keys() and [name for name in whole if not torch.equal(whole[name], again[name])] == []
