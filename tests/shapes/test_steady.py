"""The experiments on steadiness: how they sample, what the decoder is asked for, and what is measured of a LoRA."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm import MCMScheduler
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.methods import TEACHER_METHODS, Networks
from diffusers_mcm.shapes.render import render_video
from diffusers_mcm.training.arguments import parse_config

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"
SCHEDULE = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def stepped(scheduler, steps=4):
    """The sample after the first step from noise, and after a second one."""
    generator = torch.Generator().manual_seed(0)
    sample, *outputs = (torch.randn(1, 4, 3, 2, 2, generator=generator) for _ in range(3))
    scheduler.set_timesteps(steps)
    generator.manual_seed(1)
    samples = []
    for output, timestep in zip(outputs, scheduler.timesteps):
        extra = {"generator": generator} if isinstance(scheduler, MCMScheduler) else {}
        sample = scheduler.step(output, timestep, sample, **extra).prev_sample
        samples.append(sample)
    return samples


def test_all_fresh_noise_is_multistep_consistency_sampling(script):
    scheduler = script("steady_sources").LessNoise(**SCHEDULE, original_inference_steps=8)
    plain = MCMScheduler(**SCHEDULE, original_inference_steps=8)
    assert scheduler.eta == 1
    torch.testing.assert_close(stepped(scheduler), stepped(plain))


def test_no_fresh_noise_is_ddim(script):
    """To a rounding or two, and the boundary's c_skip, under 1e-6 at these timesteps."""
    scheduler = script("steady_sources").LessNoise(**SCHEDULE, original_inference_steps=8)
    scheduler.eta = 0.0
    ddim = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    torch.testing.assert_close(stepped(scheduler), stepped(ddim), atol=1e-4, rtol=1e-4)


def test_nothing_is_added_after_the_last_step(script):
    scheduler = script("steady_sources").LessNoise(**SCHEDULE, original_inference_steps=8)
    scheduler.eta = 0.0
    plain = MCMScheduler(**SCHEDULE, original_inference_steps=8)
    torch.testing.assert_close(stepped(scheduler, steps=1), stepped(plain, steps=1))


def test_truth_is_all_right_and_steadier_than_a_shuffled_one(script):
    sources = script("steady_sources")
    captions = held_out_captions()[:3]
    truth = sources.measure(sources.rendered("clean"), captions, range(3))
    assert truth["all_right"] == truth["identity_kept"] == 1

    def shuffled(captions, seeds):
        one, other = (sources.rendered("clean")([c._replace(shape=s) for c in captions], seeds) for s in TWO_SHAPES)
        return np.where(np.arange(16)[None, :, None, None, None] % 2, one, other)

    changing = sources.measure(shuffled, captions, range(3))
    assert changing["wobble"] > 3 * truth["wobble"] and changing["identity_kept"] == 0


def test_figures_of_another_model_are_not_shown_as_this_ones(script, tmp_path, monkeypatch, capsys):
    sources = script("steady_sources")
    monkeypatch.setattr(sources, "rows", lambda networks: {"rendered, clean": sources.rendered("clean")})
    command = ["steady_sources.py", "--output", str(tmp_path / "found.json"), "--prompts", "1"]
    monkeypatch.setattr("sys.argv", command)
    sources.main()
    shown = capsys.readouterr().out
    monkeypatch.setattr(sources, "measure", lambda *_: pytest.fail("it is there"))
    sources.main()
    assert capsys.readouterr().out == shown and "rendered, clean" in shown
    for other in (["--mcm", "mcm-shapes-teacher"], ["--prompts", "2"]):
        monkeypatch.setattr("sys.argv", [*command, *other])
        with pytest.raises(SystemExit, match="2"):
            sources.main()
        assert "name another --output" in capsys.readouterr().err


TWO_SHAPES = ("square", "triangle")


def test_the_outline_loss_is_nothing_for_the_same_and_all_for_a_shape_that_is_gone(script):
    decoder = script("steady_decoder")
    frames = render_video(held_out_captions()[0], 0, "clean")[:4]
    truth = torch.from_numpy(frames).movedim(-1, 1).float().div(127.5).sub(1)
    background = truth.flatten(2).median(dim=2).values[..., None, None].expand_as(truth)
    assert decoder.outline_loss(truth, truth).item() == 0
    assert decoder.outline_loss(background, truth).item() > 0.8  # the softness leaves a little everywhere
    shifted = truth.roll(2, dims=-1).requires_grad_()
    loss = decoder.outline_loss(shifted, truth)
    loss.backward()
    assert 0.05 < loss.item() < 0.8 and shifted.grad.abs().sum() > 0


def test_a_lora_is_measured_once_with_another_decoder_as_well(script, tiny_base, tmp_path, monkeypatch, capsys):
    steady = script("steady")
    monkeypatch.setattr(steady, "TEACHER_METHODS", tuple(m._replace(steps=2) for m in TEACHER_METHODS))
    flags = [tiny_base, "--teacher", tiny_base, "--name", "tiny", "--output", str(tmp_path), "--captions", "2"]
    steady.main([*flags, "--seeds", "2"])
    found = json.loads((tmp_path / "tiny-2x2.json").read_text())
    assert set(found["methods"]["mcm-4"]) >= {"wobble", "identity_kept", "spread"}
    assert found["methods"]["truth-clean"]["identity_kept"] == [1, 1, 1]
    names = [check["name"] for check in found["checks"]]
    assert "MCM 4: identity kept, %" in names and not any("LCM 4" in name.split("less")[-1] for name in names)
    assert capsys.readouterr().out.strip().endswith((tmp_path / "tiny-2x2.md").read_text().strip())

    sampled = []
    sample = Networks.sample
    monkeypatch.setattr(Networks, "sample", lambda *arguments: sampled.append(1) or sample(*arguments))
    steady.main([*flags, "--seeds", "2"])
    assert not sampled
    vae = Networks({"teacher": tiny_base}).pipeline("teacher").vae
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "vae")
    steady.main([*flags, "--seeds", "2", "--vae", str(tmp_path / "vae")])
    assert sampled and json.loads((tmp_path / "tiny-2x2.json").read_text())["vae"] == str(tmp_path / "vae")


def test_one_seed_says_nothing_of_the_spread(script):
    assert script("steady").plain(np.array([math.nan, math.nan])) == [None, None, None]


def test_the_experiments_are_trainings_that_there_are():
    """Every row of steady.sh, by the flags it adds; those beyond the paper are off in the control."""
    text = (SCRIPTS / "steady.sh").read_text()
    lines = [line.split() for line in text.splitlines() if line.startswith("lora ")]
    rows = {name: flags for _, name, *flags in lines}
    needed = ["--pretrained_teacher_model", "t", "--video_data", "v", "--image_data", "i", "--lambda_adv", "0.15"]
    configs = {name: parse_config([*needed, *flags]) for name, flags in rows.items()}
    assert set(configs) == {"paper", "calm", "all"}
    for name in ("paper", "calm"):
        assert configs[name].lambda_temporal == configs[name].lambda_change == 0
    assert configs["all"].lambda_temporal == 1 and configs["all"].lambda_change == 0.15
    measured = next(line for line in text.splitlines() if line.startswith("for name in"))
    assert measured.removeprefix("for name in").removesuffix("; do").split() == list(rows)
