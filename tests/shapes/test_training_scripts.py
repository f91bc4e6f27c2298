"""The scripts that make the packaged weights, run for two steps each, from built files to a teacher that samples."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import VideoMAEModel

from diffusers_mcm import MCMPipeline
from diffusers_mcm.shapes.build import build
from diffusers_mcm.shapes.captions import held_out_captions

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


def test_from_files_to_a_teacher_that_samples(run, tmp_path, capsys):
    built, data, models, work = (tmp_path / name for name in ("built", "data", "models", "work"))
    build(built, num_videos=16, num_images=4)
    run("prepare", built=built, data=data)
    assert np.load(data / "videos.npy", mmap_mode="r").shape == (16, 16, 64, 64, 3)
    common = {"data": data, "work": work, "steps": 2, "batch": 4}
    run("train_vae", **common, output=models / "vae")
    run("train_vae", **common, output=models / "vae", init=models / "vae", decoder_only=True)
    run("steady_decoder", **common, output=models / "steady", init=models / "vae", middle_steps=2, pool=64)
    run("train_clip", **common, output=models / "clip")
    run("train_features", **common, output=models / "features")
    run("train_video", work=work, steps=2, batch=4, output=models / "video")
    run("probe_features", data=data, features=models / "features", text=models / "clip", steps=1)
    assert re.findall(r"^(\w+): [\d.]+ % of 480$", capsys.readouterr().out, re.M) == ["colour", "shape", "background"]
    run("encode", data=data, vae=models / "vae", blocks=2)
    run("train_teacher", **common, output=models / "unet", vae=models / "vae", text=models / "clip", frame_steps=1)
    run("package", models=models, work=work, world=built, output=tmp_path / "weights")

    logs = {file.stem: [json.loads(line) for line in file.open()] for file in work.glob("*.jsonl")}
    assert {
        "vae",
        "decoder",
        "steady_middle",
        "steady_decoder",
        "clip",
        "features",
        "video",
        "teacher_frames",
        "teacher",
    } == set(logs)
    assert all(np.isfinite(log[-1]["loss"]) for log in logs.values())
    teacher = MCMPipeline.from_pretrained(tmp_path / "weights" / "mcm-shapes-teacher")
    frames = teacher("a red circle growing on a white background", num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 16, 64, 64, 3)
    video = VideoMAEModel.from_pretrained(tmp_path / "weights" / "mcm-shapes-video", dtype=torch.float32)
    assert video(torch.zeros(1, 16, 3, 64, 64)).last_hidden_state.mean(1).shape == (1, 96)
    texts = [file.read_text() for file in (tmp_path / "weights").rglob("*.json")]
    assert not any(os.fspath(tmp_path) in text for text in texts)


def test_resumed_training_repeats_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from common import train

    def run_until(folder: str, last: int) -> torch.Tensor:
        torch.manual_seed(0)
        model, calls = torch.nn.Linear(4, 4), 0
        args = Namespace(work=tmp_path / folder, lr=0.1, steps=5, seed=3, checkpoint_every=2)

        def loss_step(rng, generator):
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            x = torch.randn(2, 4, generator=generator) + float(rng.random())
            return {"loss": model(x).square().mean()}

        return train("linear", model, loss_step, args, decay=0.5).weight

    whole = run_until("whole", 5)
    with pytest.raises(KeyboardInterrupt):
        run_until("parts", 3)
    assert torch.equal(run_until("parts", 5), whole)  # from the checkpoint of step 2


def test_prepare_refuses_held_out_captions(run, tmp_path):
    build(tmp_path / "built", num_videos=2, num_images=0)
    table = tmp_path / "built" / "videos" / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], f"{lines[1].split(',')[0]},{held_out_captions()[0]}", ""]))
    with pytest.raises(ValueError, match="captions that no training may read"):
        run("prepare", built=tmp_path / "built", data=tmp_path / "data")


def test_a_decoder_alone_needs_its_autoencoder(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("train_vae", data=tmp_path, work=tmp_path, output=tmp_path, decoder_only=True)
    assert "--decoder_only needs the autoencoder whose decoder is trained: give --init" in capsys.readouterr().err
