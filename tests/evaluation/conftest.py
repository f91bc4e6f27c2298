import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

from diffusers_mcm.evaluation.records import Method
from diffusers_mcm.evaluation.results import Evaluation
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.render import render_video
from diffusers_mcm.video_io import write_video

PROTOCOL = {"reference": {"sha256": "ab", "num_videos": 500}, "window": {"num_frames": 16}, "networks": {"i3d": {}}}
CAPTIONS = [str(caption) for caption in held_out_captions()[:6]]


@pytest.fixture(scope="session")
def videomae(tmp_path_factory):
    """A tiny random VideoMAE."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = VideoMAEConfig(image_size=32, patch_size=8, num_frames=8, tubelet_size=2, **sizes)
    folder = tmp_path_factory.mktemp("networks") / "videomae"
    VideoMAEModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vjepa2(tmp_path_factory):
    """A tiny random V-JEPA 2, whose files say how pixels go in."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2)
    predictor = dict(pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2)
    config = VJEPA2Config(crop_size=32, patch_size=16, frames_per_clip=8, tubelet_size=2, **sizes, **predictor)
    folder = tmp_path_factory.mktemp("networks") / "vjepa2"
    VJEPA2Model(config).save_pretrained(folder)
    how = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(how))
    return str(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six real videos with captions, as a folder with metadata."""
    folder = tmp_path_factory.mktemp("world")
    lines = ["file_name,caption"]
    for number, caption in enumerate(CAPTIONS):
        write_video(folder / f"{number}.mp4", render_video(caption, number, "video", 64, 16))
        lines.append(f"{number}.mp4,{caption}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_samples(folder, steps=4, change=lambda video: video, seeds=range(6), captions=CAPTIONS):
    """A folder as `generate` writes it."""
    for number, (caption, seed) in enumerate(zip(captions, seeds), 1):
        video = change(render_video(caption, 100 + seed, "video", 64, 16))
        metadata = {"prompt": caption, "seed": seed, "num_inference_steps": steps, "model": "mcm-shapes"}
        write_video(Path(folder, f"{number:04d}-clip.mp4"), video, metadata=metadata)
    return str(folder)


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Two methods' folders: steady ones of four steps, and frozen ones of one."""
    root = tmp_path_factory.mktemp("samples")
    write_samples(root / "mcm4")
    write_samples(root / "mcm1", 1, lambda video: np.repeat(video[:1], 16, 0))
    return root


def ramp(count=40):
    """Frame t has brightness 4 t."""
    return np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, 16, 16, 3))


@pytest.fixture
def ramps(tmp_path):
    for number, length in enumerate((40, 12)):
        write_video(tmp_path / f"{number}.mp4", ramp(length))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.mp4,long\n1.mp4,short\n2.mp4,gone\n")
    return tmp_path


def brightness(frames):
    return np.rint(frames.mean((1, 2, 3)) / 4).tolist()


def method(fvd=500.0, steps=4, **changes):
    values = {"fvd.i3d": fvd, "motion.change": 4.0, "motion.near_still": 0.0, "motion.flicker": 0.5}
    fields = dict(source="out", num_videos=500, num_captions=500, skipped={}, steps=steps, settings={}, values=values)
    return Method(**fields | changes)


def evaluation(protocol=PROTOCOL, differences=(), notes=(), **methods):
    truth = method(values={"motion.change": 4.5})
    return Evaluation(protocol, {"torch": "2.13"}, truth, methods, list(differences), list(notes))
