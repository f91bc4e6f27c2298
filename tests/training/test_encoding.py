"""A training with a cache against one without: the same clips, the same captions, and nothing left to encode."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.base_models.wan import Wan
from diffusers_mcm.data import to_unit_range
from diffusers_mcm.distillation.draws import Coins
from diffusers_mcm.training.batches import open_data
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.encoding import encode
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.stored import ClipStore
from tests.tiny_wan import save_wan_base

from .test_distributed import DOUBLE, train_in_two_processes
from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flatten, stop_in_step_two, tiny_config

MODELSCOPE = get_base_model("modelscope")


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


def test_a_run_encodes_what_the_cache_lacks_and_no_more(world, tmp_path):
    """The clips of its own steps; a longer run goes on from there, and with what was encoded before."""
    options = dict(cache_latents=str(tmp_path / "cache"), lambda_adv=0.0, image_data=None, train_batch_size=1)
    trainer = Trainer(tiny_config(world, tmp_path / "one", max_train_steps=1, **options))
    assert trainer.cache.clips.missing(4) == [1, 2, 3]
    fresh()
    (kept,) = (tmp_path / "cache").glob("clips-*")
    written = kept.stat().st_mtime_ns
    trained(tiny_config(world, tmp_path / "two", max_train_steps=5, **options))
    assert ClipStore(tmp_path / "cache", 4).missing(4) == [] and kept.stat().st_mtime_ns == written
    fresh()
    with pytest.raises(ValueError, match="made of something else than this run needs: seed was 0, is 1"):
        Trainer(tiny_config(world, tmp_path / "three", seed=1, **options))


def test_two_processes_with_a_cache_equal_one_without(world, tmp_path):
    """In float64, to 1e-9: they encode it together, by the script, and read it in workers."""
    with double_precision():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=4, **SPLIT))
        start = flatten(one.state())
        one.train()
    # two windows, since the second step is another epoch
    cached = dict(cache_latents=str(tmp_path / "cache"), windows_per_clip=2, dataloader_num_workers=1)
    two = tiny_config(world, tmp_path / "two", train_batch_size=2, checkpointing_steps=2, **cached, **SPLIT)
    train_in_two_processes(two, tmp_path, DOUBLE)
    assert len(list((tmp_path / "cache").glob("clips-*"))) == 2
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=True)


def test_a_resumed_run_is_bit_identical_though_the_cache_was_encoded_anew(world, tmp_path):
    cached = dict(max_train_steps=3, train_batch_size=2, cache_latents=str(tmp_path / "cache"))
    whole = trained(tiny_config(world, tmp_path / "whole", **cached))
    fresh()
    stop_in_step_two(tiny_config(world, tmp_path / "parts", checkpointing_steps=1, **cached))
    shutil.rmtree(tmp_path / "cache")
    cached |= dict(cache_latents=str(tmp_path / "anew"))
    resumed = trained(tiny_config(world, tmp_path / "parts", resume_from_checkpoint="latest", **cached))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize(("kept_as", "dtype"), [("exact", torch.float32), ("bf16", torch.bfloat16)])
def test_latents_are_kept_in_the_type_that_is_asked_for(world, tmp_path, kept_as, dtype):
    """Of the four videos' clips: those of the VAE to the bit, or rounded."""
    options = dict(cache_latents=str(tmp_path / "cache"), cache_dtype=kept_as, image_data=None)
    config = tiny_config(world, tmp_path / "out", **options)
    store = ClipStore(encode(config), 4)
    data = open_data(config, (4, 16, 16), Coins(1.0))
    vae = MCMPipeline.from_pretrained(world["pretrained_teacher_model"]).vae
    for number in range(4):
        clip, video = store.read(number), data.videos.read(number)[0]
        with torch.no_grad():
            expected = MODELSCOPE.encode_posterior(vae, to_unit_range(video["pixels"])[None])
        for name, tensor in zip(("mean", "deviation"), expected, strict=True):
            assert clip[name].dtype == dtype and torch.equal(clip[name], tensor[0].to(dtype))
        assert torch.equal(clip["frames"], video["frames"]) and clip["caption"] == video["caption"]
