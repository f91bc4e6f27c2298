"""Training the spatial or the temporal modules of a LoRA alone, and one after the other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm.training.loop import Trainer, train
from tests.tiny_wan import save_wan_base

from .world import flatten, stop_in_step_two, tiny_config

PLAIN = dict(motion="raw", lambda_real=1.0, lambda_adv=0.0, image_data=None, train_batch_size=2)


def modules(keys) -> set[str]:
    return {key.partition(".lora_")[0].removeprefix("unet.") for key in keys}


def saved(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("fuse_lora", [False, True])
@pytest.mark.parametrize("base_model", ["modelscope", "animatediff"])
def test_only_the_named_modules_change(base_model, fuse_lora, world, tmp_path, request):
    flags = world if base_model == "modelscope" else request.getfixturevalue("animatediff")
    changed = {}
    for wanted in ("all", "spatial", "temporal"):
        options = dict(lora_modules=wanted, fuse_lora=fuse_lora, **PLAIN)
        trainer = Trainer(tiny_config(flags, tmp_path / wanted, **options))
        with_gradient = modules(name.removeprefix("denoiser.") for name in trainer.student.names)
        before = {key: tensor.clone() for key, tensor in trainer.state()["lora"].items()}
        weights = saved(trainer.train())
        assert weights.keys() == {f"unet.{key}" for key in before}  # the others are saved too
        changed[wanted] = modules(key for key in before if not torch.equal(weights[f"unet.{key}"], before[key]))
        assert changed[wanted] == with_gradient
    assert changed["all"] == modules(before) == changed["spatial"] | changed["temporal"]
    assert not changed["spatial"] & changed["temporal"]
    marks = {"modelscope": (".temp_attentions.", "transformer_in."), "animatediff": (".motion_modules.",)}[base_model]
    assert changed["temporal"] == {name for name in changed["all"] if any(mark in f".{name}" for mark in marks)}


def test_the_second_stage_keeps_the_first_ones_modules(world, tmp_path):
    """Pictures are clips of one frame for the spatial modules."""
    pictures = PLAIN | dict(video_data=world["image_data"], num_frames=1, lora_modules="spatial")
    first = train(tiny_config(world, tmp_path / "first", **pictures))
    second = train(
        tiny_config(world, tmp_path / "second", **PLAIN, lora_modules="temporal", pretrained_lora=str(first))
    )
    before, after = saved(first), saved(second)
    assert before.keys() == after.keys()
    temporal = {name for name in modules(after) if ".temp_attentions." in name or name.startswith("transformer_in.")}
    for key, tensor in after.items():
        kept = modules([key]).isdisjoint(temporal)
        assert torch.equal(tensor, before[key]) == kept
        assert tensor.any()
    training = json.loads((second / "mcm_config.json").read_text())["training"]
    assert training["lora_modules"] == "temporal" and training["pretrained_lora"] == "../first"


def test_a_resumed_run_is_bit_identical(world, tmp_path):
    options = PLAIN | dict(lora_modules="spatial", max_train_steps=2, ema_decay=0.5)
    whole = Trainer(tiny_config(world, tmp_path / "whole", **options))
    whole.train()

    parts = tmp_path / "parts"
    stop_in_step_two(tiny_config(world, parts, checkpointing_steps=1, **options))
    resumed = Trainer(tiny_config(world, parts, resume_from_checkpoint="latest", **options))
    resumed.train()
    one, other = flatten(whole.state()), flatten(resumed.state())
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    with pytest.raises(ValueError, match="lora_modules was spatial, is all"):
        Trainer(tiny_config(world, parts, resume_from_checkpoint="latest", **options | dict(lora_modules="all")))


def test_a_model_whose_modules_see_both_at_once(world, tmp_path):
    flow = world | dict(pretrained_teacher_model=str(save_wan_base(tmp_path / "wan")))
    with pytest.raises(ValueError, match=r"of a wan see space and time at once.*all of them \(--lora_modules all\)"):
        Trainer(tiny_config(flow, tmp_path / "lora", num_frames=5, lora_modules="spatial", **PLAIN))
