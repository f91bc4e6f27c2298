"""Distilling Wan: another path, another autoencoder, another text encoder than the paper's models have."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, WanMCMPipeline
from diffusers_mcm.base_models.wan import NEGATIVE_PROMPT
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import Trainer, train
from tests.formats.world import edit_json
from tests.tiny_wan import save_wan_base, tiny_wan_transformer
from tests.wan_loras import RANK, as_keys, original_file, random_differences, random_tensors, write

from .test_distributed import DOUBLE, TORCHRUN, train_in_two_processes
from .test_sharding import FSDP
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

NUM_FRAMES = 5  # two of the latents
SIZES = {"wan": 16, "wan-ti2v": 32}  # pixels, one token to a latent frame
PLAIN = dict(motion="raw", lambda_real=1.0, lambda_adv=0.0, image_data=None)


@pytest.fixture(scope="module")
def bases(world, tmp_path_factory):
    """The flags of a tiny world with each kind of Wan as the teacher."""
    folder = tmp_path_factory.mktemp("wan")
    return {kind: world | dict(pretrained_teacher_model=str(save_wan_base(folder / kind, kind))) for kind in SIZES}


@pytest.fixture
def wan(bases):
    return bases["wan"]


def wan_config(flags, output_dir, **options):
    size = SIZES[Path(flags["pretrained_teacher_model"]).name]
    sizes = dict(num_frames=NUM_FRAMES, height=size, width=size, train_batch_size=2)
    return tiny_config(flags, output_dir, **sizes | options)


def test_from_videos_to_a_lora_that_samples(wan, tmp_path):
    options = dict(gradient_checkpointing=True, validation_prompts=(CAPTIONS[0],), shift=8.0, frame_interval=None)
    out = train(parse_config(flags_of(wan_config(wan, tmp_path / "lora", **options))))
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(tensor.any() for key, tensor in weights.items() if ".lora_B." in key)
    assert str(tmp_path) not in (out / "mcm_config.json").read_text()
    config = json.loads((out / "mcm_config.json").read_text())
    training = config["training"]
    assert config["base_model"] == training["base_model"] == "wan" and config["sampling"]["fps"] == 16
    assert [training[f"guidance_{end}"] for end in ("min", "max")] == [2.0, 6.0]
    assert (training["negative_prompt"], training["num_solver_steps"]) == (NEGATIVE_PROMPT, 48)
    assert (training["data_fps"], training["frame_interval"], training["shift"]) == (16.0, None, 8.0)
    assert (out / "validation" / "step-000002" / "00.mp4").is_file() and (out / "README.md").is_file()
    pipe = MCMPipeline.from_pretrained(out)
    assert type(pipe) is WanMCMPipeline and type(pipe.scheduler) is MCMFlowScheduler
    scheduler = dict(num_train_timesteps=1000, original_inference_steps=48, shift=8.0, stochastic=True)
    scheduler |= dict(boundary=None, trained_timesteps=None)
    saved = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    for found in (saved, pipe.scheduler.config):
        assert {key: value for key, value in found.items() if key[0] != "_"} == scheduler
    pipe.set_progress_bar_config(disable=True)
    with_lora, without = (
        pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), lora_scale=scale).frames for scale in (1.0, 0.0)
    )
    assert with_lora.shape == (1, NUM_FRAMES, 16, 16, 3) and (with_lora != without).any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(num_frames=6), "`num_frames` must be .*; got 6"),
        (dict(height=20), "`height` must be a positive multiple"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_size_without_latents_is_refused_before_anything_is_loaded(
    wan, tmp_path, monkeypatch, sizes, message, cached
):
    monkeypatch.setattr("diffusers_mcm.training.networks.load_component", lambda *given, **options: 1 / 0)
    monkeypatch.setattr("diffusers_mcm.training.networks.load_teacher", lambda *given, **options: 1 / 0)
    monkeypatch.setattr("diffusers_mcm.training.run.open_data", lambda *given, **options: 1 / 0)
    cache = dict(cache_latents=str(tmp_path / "cache")) if cached else {}
    with pytest.raises(ValueError, match=message):
        Trainer(wan_config(wan, tmp_path / "lora", **sizes, **cache)).train()


def test_the_teachers_own_rate_of_frames_goes_on(wan, tmp_path):
    base = shutil.copytree(wan["pretrained_teacher_model"], tmp_path / "wan")
    edit_json(base / "model_index.json", fps=6)
    flags = wan | dict(pretrained_teacher_model=str(base))
    out = train(wan_config(flags, tmp_path / "lora", **PLAIN, frame_interval=1, max_train_steps=1))
    assert json.loads((out / "mcm_config.json").read_text())["sampling"]["fps"] == 6
    assert MCMPipeline.from_pretrained(out).sampling_default("fps") == 6


def test_a_lora_that_changes_more_than_pairs_is_no_start(wan, tmp_path):
    whole = original_file(random_tensors(), 2.0) | as_keys(random_differences(tiny_wan_transformer()))
    file = write(tmp_path / "lightx2v.safetensors", whole)
    config = wan_config(wan, tmp_path / "lora", **PLAIN, lora_rank=RANK, lora_alpha=2, pretrained_lora=str(file))
    with pytest.raises(
        ValueError, match="adds to 14 parameters .*and a training goes on with pairs of matrices alone"
    ):
        Trainer(config).train()


@pytest.mark.parametrize(("given", "read"), [(None, NEGATIVE_PROMPT), ("", ""), ("a blur", "a blur")])
def test_what_guidance_leads_away_from(wan, tmp_path, given, read):
    trainer = Trainer(wan_config(wan, tmp_path, **PLAIN | dict(negative_prompt=given, max_train_steps=1)))
    encoded, encode = [], trainer.networks.text.row
    trainer.networks.text.row = lambda caption: (encoded.append(caption), encode(caption))[1]
    trainer.train()
    assert set(encoded) - set(CAPTIONS) == {read}


def test_the_shift_is_the_grids_that_is_trained(wan, tmp_path):
    trainer = Trainer(wan_config(wan, tmp_path, **PLAIN, shift=3.0, num_solver_steps=20))
    u = torch.arange(1, 21) / 20
    torch.testing.assert_close(trainer.timesteps, 3000 * u / (1 + 2 * u))
    assert trainer.networks.student.path.shift == trainer.networks.pipeline.scheduler.config.shift == 3.0
    assert trainer.networks.pipeline.scheduler.config.original_inference_steps == 20


@pytest.mark.parametrize("kind", ["wan", "wan-ti2v"])
@pytest.mark.parametrize("decoder", ["exact", "image"])
def test_the_judge_sees_frames_by_either_decoder(bases, tmp_path, kind, decoder, monkeypatch):
    trainer = Trainer(wan_config(bases[kind], tmp_path, max_train_steps=1, frame_decoder=decoder))
    asked, decode_frames = [], type(trainer.networks.base_model).decode_frames

    def decode(self, vae, latents, frame_indices, decoder):
        asked.append((latents.dtype, decoder))
        return decode_frames(self, vae, latents, frame_indices, decoder)

    monkeypatch.setattr(type(trainer.networks.base_model), "decode_frames", decode)
    trainer.train()
    assert asked == [(torch.float32, decoder)]


def test_checkpointing_gives_the_same_training(wan, tmp_path):
    states = []
    for checkpointing in (False, True):
        options = PLAIN | dict(gradient_checkpointing=checkpointing)
        trainer = Trainer(wan_config(wan, tmp_path / str(checkpointing), **options))
        trainer.train()
        states.append(flatten(trainer.state()))
    one, other = states
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_bit_identical(wan, tmp_path, precision):
    options = dict(max_train_steps=2, mixed_precision=precision)
    trainer = Trainer(wan_config(wan, tmp_path / "whole", **options))
    trainer.train()

    parts = tmp_path / "parts"
    stop_in_step_two(wan_config(wan, parts, checkpointing_steps=1, **options))
    resumed = Trainer(wan_config(wan, parts, resume_from_checkpoint="latest", **options))
    resumed.train()
    whole, again = flatten(trainer.state()), flatten(resumed.state())
    assert whole.keys() == again.keys() and [name for name in whole if not torch.equal(whole[name], again[name])] == []
    with pytest.raises(ValueError, match=r"cannot be gone on with other settings: shift was 5.0, is 3.0"):
        Trainer(wan_config(wan, parts, resume_from_checkpoint="latest", **options, shift=3.0))


def test_a_half_precision_network_trains_on_float32_latents_at_exact_times(wan, tmp_path, monkeypatch):
    trainer, given = Trainer(wan_config(wan, tmp_path, max_train_steps=1, mixed_precision="bf16")), []
    base = type(trainer.networks.base_model)
    denoise = base.denoise

    def watched(self, denoiser, latents, timesteps, text):
        output = denoise(self, denoiser, latents, timesteps, text)
        given.append((denoiser.dtype, latents.dtype, output.dtype, timesteps.dtype))
        return output

    monkeypatch.setattr(base, "denoise", watched)
    trainer.train()
    assert set(given) == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}


def test_the_autoencoder_stays_in_float32_whatever_the_network_computes_in(bases, tmp_path):
    """Its weights are the repository's own, and autocast leaves what it computes alone, the recomputed part too."""
    flags = bases["wan"]
    trainer = Trainer(wan_config(flags, tmp_path, mixed_precision="bf16", gradient_checkpointing=True))
    vae, base = trainer.networks.student.vae, trainer.networks.base_model
    stored = load_file(Path(flags["pretrained_teacher_model"]) / "vae" / "diffusion_pytorch_model.safetensors")
    assert trainer.networks.student.denoiser.blocks[0].ffn.net[2].base_layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in stored.items())
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float32}

    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, NUM_FRAMES, 16, 16, generator=generator) * 2 - 1

    def through_it():
        latents = base.encode_video(vae, pixels).requires_grad_()
        frames = base.decode_frames(vae, latents, torch.tensor([[0, 4]]))
        return [latents, frames, *torch.autograd.grad(frames.square().sum(), latents)]

    plain = through_it()
    with trainer.accelerator.autocast():
        for found, expected in zip(through_it(), plain):
            assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert plain[-1].any()


@pytest.mark.parametrize("launch", [TORCHRUN, FSDP], ids=["whole", "split"])
def test_two_processes_equal_one_big_batch(wan, tmp_path, launch):
    wan = wan | dict(video_data=str(shutil.copytree(wan["video_data"], tmp_path / "videos")))
    with double_precision():
        one = Trainer(wan_config(wan, tmp_path / "one", **SPLIT))
        start = flatten(one.state())
        one.train()
    two = wan_config(wan, tmp_path / "two", train_batch_size=1, checkpointing_steps=2, **SPLIT)
    said = train_in_two_processes(two, tmp_path, DOUBLE, launch=launch)
    assert ("are split: " in said) == (launch == FSDP)
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=True)
