"""A training with a cache against one without: the same clips, the same captions, and nothing left to encode."""

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_mcm.base_models.wan import Wan
from diffusers_mcm.training.encoding import encode
from diffusers_mcm.training.loop import Trainer
from tests.tiny_wan import save_wan_base

from .world import CAPTIONS, SPLIT, double_precision, flatten, tiny_config


def fresh():
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(config) -> dict[str, torch.Tensor]:
    fresh()
    trainer = Trainer(config)
    trainer.train()
    return flatten(trainer.state())


def assert_equal(one, other, tolerance=1e-9):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).norm() <= tolerance * max(value.norm(), 1e-12), name


@pytest.fixture(params=["modelscope", "animatediff", "wan"])
def base_world(request, world, animatediff, tmp_path):
    if request.param == "wan":
        save_wan_base(tmp_path / "wan")
        return world | dict(pretrained_teacher_model=str(tmp_path / "wan"), num_frames=5)
    return {"modelscope": world, "animatediff": animatediff}[request.param]


@pytest.mark.parametrize("images", [True, False], ids=["images", "own frames"])
def test_training_with_a_cache_equals_one_without(base_world, tmp_path, images, monkeypatch):
    """In float64, over the edge of an epoch: four videos, two windows of each, and two clips of the third epoch."""
    monkeypatch.setattr(Wan, "vae_dtype", torch.float64)  # else it would be float32 in the one and not in the other
    options = SPLIT | dict(max_train_steps=5, train_batch_size=2, windows_per_clip=2)
    options |= {} if images else dict(image_data=None)
    sizes = {"num_frames": base_world.get("num_frames", 4)}
    flags = {name: value for name, value in base_world.items() if name != "num_frames"}
    cached = options | sizes | dict(cache_latents=str(tmp_path / "cache"))
    with double_precision():
        plain = trained(tiny_config(flags, tmp_path / "plain", **options, **sizes))
        fresh()
        encode(tiny_config(flags, tmp_path / "out", **cached))
        with_cache = trained(tiny_config(flags, tmp_path / "cached", **cached))
    assert_equal(plain, with_cache)


def test_a_step_with_a_cache_encodes_nothing(world, tmp_path, monkeypatch):
    """Neither clips nor texts, of the validation clips neither; and no text encoder is there."""
    options = dict(cache_latents=str(tmp_path / "cache"), validation_prompts=("a red ring", CAPTIONS[0]))
    encode(tiny_config(world, tmp_path / "out", **options))
    calls = []
    for kind in ("diffusers.AutoencoderKL.encode", "transformers.CLIPTextModel.forward"):
        monkeypatch.setattr(kind, lambda *given, kind=kind, **named: calls.append(kind))
    monkeypatch.setattr("transformers.CLIPTextModelWithProjection.from_pretrained", lambda *given, **named: 1 / 0)
    fresh()
    trainer = Trainer(tiny_config(world, tmp_path / "lora", **options))
    assert trainer.networks.pipeline.text_encoder is None and trainer.networks.pipeline.tokenizer is None
    trainer.train()
    assert calls == [] and (tmp_path / "lora" / "validation" / "step-000002" / "01.mp4").is_file()
