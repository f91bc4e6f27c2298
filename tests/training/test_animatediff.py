"""Distilling another base model, Stable Diffusion with a motion adapter: from mp4s to a LoRA that samples."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.loop import Trainer, train

from .world import CAPTIONS, flags_of, flatten, stop_in_step_two, tiny_config


def test_from_videos_to_a_lora_that_samples(animatediff, tmp_path):
    options = dict(base_model="animatediff", gradient_checkpointing=True, validation_prompts=(CAPTIONS[0],))
    out = train(parse_config(flags_of(tiny_config(animatediff, tmp_path / "lora", **options))))
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert any(".motion_modules.0.proj_in.lora_B." in key and tensor.any() for key, tensor in weights.items())
    assert any(".attentions.0.proj_in.lora_B." in key and tensor.any() for key, tensor in weights.items())
    assert str(tmp_path) not in (out / "mcm_config.json").read_text()
    config = json.loads((out / "mcm_config.json").read_text())
    assert config["base_model"] == config["training"]["base_model"] == "animatediff"
    assert [config["training"][f"guidance_{end}"] for end in ("min", "max")] == [7.0, 8.0]
    pipe = MCMPipeline.from_pretrained(out)
    assert type(pipe) is AnimateDiffMCMPipeline
    assert (pipe.scheduler.config.beta_schedule, pipe.scheduler.config.timestep_scaling) == ("linear", 4.0)
    pipe.set_progress_bar_config(disable=True)
    with_lora, without = (
        pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), lora_scale=scale, output_type="np").frames
        for scale in (1.0, 0.0)
    )
    assert with_lora.shape == (1, 4, 16, 16, 3) and (with_lora != without).any()


def test_a_resumed_run_is_bit_identical(animatediff, tmp_path):
    options = dict(max_train_steps=2, train_batch_size=1)
    trainer = Trainer(tiny_config(animatediff, tmp_path / "whole", **options))
    trainer.train()

    parts = tmp_path / "parts"
    stop_in_step_two(tiny_config(animatediff, parts, checkpointing_steps=1, **options))
    resumed = Trainer(tiny_config(animatediff, parts, resume_from_checkpoint="latest", **options))
    resumed.train()
    whole, again = flatten(trainer.state()), flatten(resumed.state())
    assert whole.keys() == again.keys() and [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_another_motion_adapter_is_told_of_when_a_run_goes_on(animatediff, tmp_path, caplog):
    options = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, checkpointing_steps=1, max_train_steps=1)
    train(tiny_config(animatediff, tmp_path / "out", **options))
    options |= dict(resume_from_checkpoint="latest", max_train_steps=2)
    Trainer(tiny_config(animatediff, tmp_path / "out", **options))
    assert "extra_repositories was " not in caplog.text
    adapter = animatediff["extra_repositories"][0].partition("=")[2]
    shutil.copytree(adapter, tmp_path / "other")
    options |= dict(extra_repositories=(f"motion_adapter={tmp_path / 'other'}",))
    Trainer(tiny_config(animatediff, tmp_path / "out", **options))
    assert "extra_repositories was ['motion_adapter=../" in caplog.text
    assert "is ['motion_adapter=../other']" in caplog.text


def test_components_that_the_teacher_does_not_have(animatediff, world, tmp_path):
    for base, given in (
        (animatediff, "vae=somewhere/else"),
        (animatediff, "motion_adapter"),
        (world, "motion_adapter=a/b"),
    ):
        with pytest.raises(ValueError, match=r"--extra_repositories takes name=repository.*\((motion_adapter|none)\)"):
            Trainer(tiny_config(base, tmp_path, extra_repositories=(given,)))
