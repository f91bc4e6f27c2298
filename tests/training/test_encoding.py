"""A training with a cache against one without: the same clips, the same captions, and nothing left to encode."""

import dataclasses
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from diffusers_mcm import MCMPipeline
from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.base_models.wan import Wan
from diffusers_mcm.data import to_unit_range
from diffusers_mcm.distillation.draws import Coins
from diffusers_mcm.distillation.motion import MOTION_REPRESENTATIONS
from diffusers_mcm.settings import EXPERTS
from diffusers_mcm.training.batches import open_data
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.encoding import encode
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.stored import ClipStore, TextStore
from tests.tiny_wan import save_wan_base

from .test_distributed import DOUBLE, train_in_two_processes
from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flatten, stop_in_step_two, tiny_config

KILLED = Path(__file__).with_name("killed_while_encoding.py")
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


def wan_world(world, folder, kind, **options):
    """The flags of the world with a Wan as the teacher, and options of the run."""
    base = folder / kind
    if not base.exists():
        save_wan_base(base, kind)
    return world | dict(pretrained_teacher_model=str(base)), dict(num_frames=5) | options


@pytest.fixture(params=["modelscope", "animatediff", "wan", "wan-ti2v", "high_noise", "low_noise"])
def base_world(request, world, animatediff, tmp_path, monkeypatch):
    if request.param in ("modelscope", "animatediff"):
        return (world if request.param == "modelscope" else animatediff), {}
    sizes = dict(height=32, width=32) if request.param == "wan-ti2v" else {}
    expert = dict(expert=request.param) if request.param in EXPERTS else {}
    return wan_world(world, tmp_path, "wan-a14b" if expert else request.param, **sizes, **expert)


@pytest.mark.parametrize("images", [True, False], ids=["images", "own frames"])
def test_training_with_a_cache_equals_one_without(base_world, tmp_path, images, monkeypatch):
    """In float64, over the edge of an epoch: four videos, two windows of each, and two clips of the third epoch."""
    monkeypatch.setattr(Wan, "vae_dtype", torch.float64)  # else it would be float32 in the one and not in the other
    flags, options = base_world
    options = SPLIT | dict(max_train_steps=5, train_batch_size=2, windows_per_clip=2) | options
    options |= {} if images else dict(image_data=None)
    cached = options | dict(cache_latents=str(tmp_path / "cache"))
    with double_precision():
        plain = trained(tiny_config(flags, tmp_path / "plain", **options))
        fresh()
        encode(tiny_config(flags, tmp_path / "out", **cached))
        with_cache = trained(tiny_config(flags, tmp_path / "cached", **cached))
    assert_equal(plain, with_cache)


def test_whatever_the_motion_a_cache_changes_nothing(world, tmp_path):
    """One cache serves them all."""
    shared = SPLIT | dict(max_train_steps=1, train_batch_size=2, windows_per_clip=1)
    with double_precision():
        for motion in MOTION_REPRESENTATIONS:
            options = shared | dict(motion=motion)
            plain = trained(tiny_config(world, tmp_path / f"{motion} plain", **options))
            options |= dict(cache_latents=str(tmp_path / "cache"))
            assert_equal(plain, trained(tiny_config(world, tmp_path / motion, **options)))
    assert len(list((tmp_path / "cache").glob("clips-*"))) == 1


def test_one_cache_serves_both_experts(world, tmp_path, monkeypatch):
    for expert in EXPERTS:
        flags, options = wan_world(world, tmp_path, "wan-a14b", expert=expert, cache_latents=str(tmp_path / "cache"))
        fresh()
        Trainer(tiny_config(flags, tmp_path / expert, **options)).train()
        monkeypatch.setattr("diffusers_mcm.training.encoding.load_network", lambda *given: 1 / 0)
        monkeypatch.setattr("diffusers_mcm.training.encoding.load_text_encoder", lambda *given: 1 / 0)


@pytest.fixture
def loaded(monkeypatch):
    """The classes of the networks that are read from a disk."""
    names = []
    for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
        read = kind.from_pretrained.__func__

        def noted(cls, *given, _read=read, **named):
            names.append(cls.__name__)
            return _read(cls, *given, **named)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(noted))
    return names


def test_with_a_whole_cache_no_encoder_is_there(base_world, tmp_path, loaded):
    """No text encoder is read, the VAE once, for its decoder; nothing of its encoder is left to take memory."""
    flags, options = base_world
    config = tiny_config(flags, tmp_path / "out", cache_latents=str(tmp_path / "cache"), **options)
    encode(config)
    encoders = {name for name in loaded if "Encoder" in name or "Text" in name}
    assert len(encoders) == 2  # of the denoiser, of the discriminator
    loaded.clear()
    fresh()
    trainer = Trainer(config)
    assert encoders.isdisjoint(loaded) and sum("Autoencoder" in name for name in loaded) == 1
    pipeline = trainer.networks.pipeline
    parameters = {name.partition(".")[0] for name, _ in pipeline.vae.named_parameters()}
    assert parameters == {"decoder", "post_quant_conv"} and pipeline.text_encoder is None
    trainer.train()


def test_a_step_with_a_cache_encodes_nothing(world, tmp_path, monkeypatch):
    """Neither clips nor texts, of the validation clips neither."""
    options = dict(cache_latents=str(tmp_path / "cache"), validation_prompts=("a red ring", CAPTIONS[0]))
    encode(tiny_config(world, tmp_path / "out", **options))
    calls = []
    for kind in ("diffusers.AutoencoderKL.encode", "transformers.CLIPTextModel.forward"):
        monkeypatch.setattr(kind, lambda *given, kind=kind, **named: calls.append(kind))
    fresh()
    Trainer(tiny_config(world, tmp_path / "lora", **options)).train()
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
    """In float64, to 1e-9: they encode it together, by the script, read it in workers, and go on with what others have
    encoded that were killed over it."""
    with double_precision():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=4, **SPLIT))
        start = flatten(one.state())
        one.train()
    # two windows, since the second step is another epoch
    cached = dict(cache_latents=str(tmp_path / "cache"), windows_per_clip=2, dataloader_num_workers=2)
    two = tiny_config(world, tmp_path / "two", train_batch_size=2, checkpointing_steps=2, **cached, **SPLIT)
    with pytest.raises(AssertionError, match="SIGKILL"):
        train_in_two_processes(two, tmp_path, KILLED)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("clips-*")}
    half = list((tmp_path / "cache").glob(".clips-*"))
    assert half and 2 <= len(written) <= 4
    for path in half:
        os.utime(path, (0, 0))  # a minute later
    train_in_two_processes(two, tmp_path, DOUBLE)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert len(list((tmp_path / "cache").glob("clips-*"))) == len(written) + 2
    assert ClipStore(tmp_path / "cache", 8).missing(8) == [] and not any(path.exists() for path in half)
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=True)


def test_a_run_that_judges_no_frames_keeps_them_for_one_that_does(world, tmp_path):
    """Its own part of a cache is as that which was there, or the next run would find clips without their frames."""
    options = dict(cache_latents=str(tmp_path / "cache"), train_batch_size=1)
    runs = [dict(max_train_steps=1, image_data=None), dict(lambda_adv=0.0, image_data=None), dict(image_data=None)]
    for number, run in enumerate(runs):
        trained(tiny_config(world, tmp_path / str(number), **({"max_train_steps": 4} | options | run)))
        fresh()
    assert ClipStore(tmp_path / "cache", 4).read(3)["frames"].shape == (2, 3, 16, 16)


def test_the_room_is_looked_at_before_anything_is_written(world, tmp_path, monkeypatch, caplog):
    config = tiny_config(world, tmp_path / "out", cache_latents=str(tmp_path / "cache"), windows_per_clip=2)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=60_000))
    with pytest.raises(
        ValueError,
        match="8 clips of about 8.19 kB each take 65.5 kB in .*cache, where 60 kB are free: make room, or name a",
    ):
        encode(config)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=70_000))
    caplog.set_level("INFO")
    encode(config)
    assert "take 65.5 kB in" in caplog.text and "of 70 kB that there are" in caplog.text
    assert "texts (prompt) of about" in caplog.text
    next((tmp_path / "cache").glob("clips-*")).unlink()
    encode(dataclasses.replace(config, windows_per_clip=1))
    encode(config)
    assert "Of 8 clips 4 are in" in caplog.text


@pytest.mark.parametrize(("store", "lost"), [(ClipStore, "4 clips"), (TextStore, "5 texts")])
def test_processes_that_do_not_see_each_others_files_are_told(world, tmp_path, monkeypatch, store, lost):
    monkeypatch.setattr(store, "write", lambda self, what: None)
    config = tiny_config(world, tmp_path / "out", cache_latents=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"{lost} are not in .*cache as process 0 sees it, .* that they share"):
        encode(config)


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
