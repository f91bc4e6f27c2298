"""The packaged teacher on the straight path: the same network, by a closed form and by diffusers' DDIM."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet3DConditionModel

from diffusers_mcm.scheduler import MCMFlowScheduler
from diffusers_mcm.shapes.build import build
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.methods import Method
from tests.tiny import tiny_unet

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture
def flow_teacher(monkeypatch):
    """Imported anew for each test, because to be imported registers its base model, and that is forgotten after it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("flow_teacher", None)
    return importlib.import_module("flow_teacher")


def flow_unet(flow_teacher, seed=0):
    """The tiny UNet, and the same weights on the straight path; float64."""
    unet = tiny_unet(seed).double().eval()
    flow = flow_teacher.FlowUNet3DConditionModel.from_config(unet.config).double().eval()
    flow.load_state_dict(unet.state_dict())
    return unet, flow


def sigma_at(t: torch.Tensor, schedule: dict) -> torch.Tensor:
    """σ of the straight path with the signal-to-noise ratio of a timestep, float64."""
    alpha = DDIMScheduler(**schedule).alphas_cumprod.double()[t].sqrt()
    return (1 - alpha**2).sqrt() / (alpha + (1 - alpha**2).sqrt())


def test_the_velocity_is_that_of_a_gaussian_whose_v_prediction_the_network_knows(flow_teacher, monkeypatch):
    mean, deviation = 0.3, 0.7
    alphas = DDIMScheduler(**flow_teacher.SCHEDULE).alphas_cumprod.double().sqrt()

    def x0_and_noise(x, alpha, sigma):
        x0 = mean + alpha * deviation**2 * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        return x0, (x - alpha * x0) / sigma

    def knows(self, sample, timestep, *_, **__):
        alpha = alphas[timestep.round().long()].view(-1, 1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        x0, noise = x0_and_noise(sample, alpha, sigma)
        return (alpha * noise - sigma * x0,)

    _, flow = flow_unet(flow_teacher)
    monkeypatch.setattr(UNet3DConditionModel, "forward", knows)
    t = torch.tensor([40, 250, 500, 750, 999])
    sigma = sigma_at(t, flow_teacher.SCHEDULE)
    x = torch.randn(5, 4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_path = sigma.view(-1, 1, 1, 1, 1)
    x0, noise = x0_and_noise(x, 1 - of_path, of_path)
    velocity = flow(x, 1000 * sigma, None, return_dict=False)[0]
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-4)  # the schedule is float32
    torch.testing.assert_close(flow(x, 1000 * sigma, None).sample, velocity, rtol=0, atol=0)


def test_euler_steps_are_ddim_steps(flow_teacher):
    unet, flow = flow_unet(flow_teacher)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, dtype=torch.float64, generator=generator)
    x = torch.randn(2, unet.config.in_channels, 2, 8, 8, dtype=torch.float64, generator=generator)
    ddim, euler = DDIMScheduler(**flow_teacher.SCHEDULE), MCMFlowScheduler(stochastic=False)
    ddim.set_timesteps(4)
    sigmas = sigma_at(ddim.timesteps, flow_teacher.SCHEDULE)
    euler.set_timesteps(timesteps=(1000 * sigmas).tolist())
    lengths = torch.hypot(1 - sigmas, sigmas)
    straight = x * lengths[0]
    with torch.no_grad():
        for i, (t, t_flow) in enumerate(zip(ddim.timesteps, euler.timesteps)):
            torch.testing.assert_close(straight, x * lengths[i], rtol=0, atol=1e-4)
            there = ddim.step(unet(x, t, text).sample, t, x)
            here = euler.step(flow(straight, t_flow, text).sample, t_flow, straight)
            # schedule and timesteps are float32
            torch.testing.assert_close(here.denoised, there.pred_original_sample, rtol=0, atol=1e-4)
            x, straight = there.prev_sample, here.prev_sample


def test_timesteps_are_the_networks_own_and_end_where_they_end(flow_teacher):
    t = torch.arange(1000)
    back = flow_teacher.timestep_of(sigma_at(t, flow_teacher.SCHEDULE))
    torch.testing.assert_close(back[10:], t[10:].double(), rtol=0, atol=1e-2)  # the first ones are rounded by float32
    assert flow_teacher.timestep_of(torch.tensor([0.0, 0.001, 0.999, 1.0])).tolist() == [0, 0, 999, 999]


def test_the_scripts_train_and_measure_and_keep_what_is_there(flow_teacher, tmp_path, monkeypatch):
    import flow
    import scoring

    build(tmp_path / "world", num_videos=4, num_images=4, image_domains=["clean"])
    monkeypatch.setattr(flow, "RECIPE", flow.RECIPE | dict(train_batch_size=1, lora_rank=2, lora_alpha=2))
    monkeypatch.setattr(flow, "WEIGHTS", (0.5,))
    monkeypatch.setattr(flow, "BASELINES", (Method("flow-euler-1", "Euler", "euler", "mcm", 1),))
    monkeypatch.setattr(flow, "distilled", lambda name, label, few=(): [Method(name, label, name, "mcm", 1)])
    monkeypatch.setattr(scoring, "held_out_captions", lambda: held_out_captions()[:1])
    output, scores = tmp_path / "out", tmp_path / "scores.json"
    flags = [f"--output={output}", f"--scores={scores}", f"--world={tmp_path / 'world'}", "--steps=1", "--seeds=1"]
    flow.main(flags)
    record = json.loads(scores.read_text())
    assert list(record["methods"]) == ["flow-euler-1", "adv-0.5"] and record["protocol"]["shift"] == flow.SHIFT
    assert all(len(line["all_right"]) == 3 for line in record["methods"].values())
    assert record["table"]["about"] == "1 held-out captions × 1 seeds, 16 frames of each video."
    assert [row[0] for row in record["table"]["rows"]] == ["Euler", "MCM, λ_adv 0.5"]
    assert len(record["table"]["rows"][0]) == 1 + len(record["table"]["columns"])
    scheduler = json.loads((output / "adv-0.5" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("MCMFlowScheduler", flow.SHIFT)

    (tmp_path / "bin").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"  # trains nothing: what is there is the LoRA
    torchrun.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\nwhile [ "$1" != --output_dir ]; do shift; done\n'
        f'exec cp -r {output}/adv-0.5 "$2"\n'
    )
    torchrun.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        flow.main([*flags, "--full"])
    first, second = (tmp_path / "said").read_text().splitlines()
    for said in (first, second):
        assert f"{flow.DISTIL} --pretrained_teacher_model {output / 'teacher'} " in said and " --shift 5.0 " in said
    assert "--lambda_adv 0.5" in first and f"--pretrained_lora {output}/full-appearance" in second
    record = json.loads(scores.read_text())
    assert list(record["methods"]) == ["flow-euler-1", "adv-0.5", "full"]

    monkeypatch.setattr(flow.subprocess, "run", lambda *_, **__: pytest.fail("it is trained already"))
    monkeypatch.setattr(scoring.Networks, "sample", lambda *_: pytest.fail("it is sampled already"))
    flow.main([*flags, "--full"])
    assert json.loads(scores.read_text()) == record
    with pytest.raises(ValueError, match=r"expected what .*out was trained with, \{'shift': 5.0, .*: name another fo"):
        flow.main([*flags, "--shift=3"])
    with pytest.raises(ValueError, match=r"expected what .* was measured with, .*: name another file"):
        scoring.add_scores(scores, record["protocol"] | {"seeds": 2}, None, [])
    of_before = {name: {k: v for k, v in line.items() if k != "wobble"} for name, line in record["methods"].items()}
    (tmp_path / "before.json").write_text(json.dumps(record | {"methods": of_before}))
    with pytest.raises(ValueError, match="expected all metrics in .*, of which it lacks wobble: name another file"):
        scoring.add_scores(tmp_path / "before.json", record["protocol"], None, [])
    assert json.loads(scores.read_text()) == record
