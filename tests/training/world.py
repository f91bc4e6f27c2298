"""A whole tiny world on disk: base model, discriminator networks, mp4s and pictures; and the flags that name them."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.video_io import write_mp4
from tests.discriminator.tiny import tiny_clip_text, tiny_dinov2
from tests.tiny import NUM_FRAMES, SIZE, save_tiny_base, tiny_tokenizer

CAPTIONS = (
    "a red circle moving left on a black background",
    "a green square moving up on a white background",
    "a blue ring growing on a gray background",
    "a yellow triangle shrinking on a cyan background",
)
IMAGE_SIZE = 32  # libx264 and DINO's patches want more than the base model's 16 pixels


def make_videos(folder: Path, num_frames: int = 2 * NUM_FRAMES) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number, caption in enumerate(CAPTIONS):
        ramp = np.linspace(0, 1, IMAGE_SIZE)[None, :, None] * np.array([0.2, 0.5, 0.9])
        frames = np.stack(
            [np.broadcast_to(np.roll(ramp, f + number, 1), (IMAGE_SIZE,) * 2 + (3,)) for f in range(num_frames)]
        )
        write_mp4(folder / f"{number}.mp4", frames)
        rows.append((f"{number}.mp4", caption))
    _write_metadata(folder, rows)
    return folder


def make_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(number).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"{caption}, sharp"))
    _write_metadata(folder, rows)
    return folder


def _write_metadata(folder: Path, rows: list[tuple[str, str]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *rows])


def make_world(folder: Path) -> dict[str, str]:
    """The flags for a run in this world, as a dictionary."""
    save_tiny_base(folder / "base")
    tiny_dinov2(num_hidden_layers=12).save_pretrained(folder / "features")
    tiny_clip_text().save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    return dict(
        pretrained_teacher_model=str(folder / "base"),
        discriminator_features=str(folder / "features"),
        discriminator_text=str(folder / "clip"),
        video_data=str(make_videos(folder / "videos")),
        image_data=str(make_images(folder / "images")),
    )


def tiny_config(world: dict[str, str], output_dir: Path, **overrides) -> TrainingConfig:
    options = dict(
        num_frames=NUM_FRAMES,
        height=SIZE,
        width=SIZE,
        frame_interval=1,
        lora_rank=2,
        lora_alpha=2.0,
        train_batch_size=4,
        max_train_steps=2,
        learning_rate=1e-3,
        discriminator_learning_rate=1e-3,
        scale_lr=False,
        lr_warmup_steps=0,
        report_to="none",
        checkpointing_steps=0,
    )
    return TrainingConfig(**(world | options | {"output_dir": str(output_dir)} | overrides))


def flags_of(config: TrainingConfig) -> list[str]:
    """The command line that makes this configuration."""
    flags = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if value == entry.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no_'}{entry.name}")
        else:
            flags += [f"--{entry.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def flatten(state: dict) -> dict[str, torch.Tensor]:
    """Every tensor and number that training changes, by the path of keys that leads to it."""
    flat = {}

    def walk(path: str, value) -> None:
        if isinstance(value, torch.Tensor):
            flat[path] = value.detach().clone()
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, int | float) and path != "/seconds":
            flat[path] = torch.tensor(value)

    walk("", state)
    return flat


# Settings under which a split batch is compared with a whole one. The distance's c is the scale below which a
# difference of latents counts as none: at 0.001 it magnifies float32's rounding a thousandfold, in whole batches too.
# Strong guidance and AdamW's epsilon do the same.
SPLIT = dict(max_train_steps=2, huber_c=1.0, adam_epsilon=1e-3, guidance_min=0.0, guidance_max=1.0)


def assert_same_training(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Weights and averages agree to 1e-5 of their norm, the optimisers' moments (that is, gradients) to 1e-4."""
    assert first.keys() == second.keys()
    kinds: dict[str, list[str]] = {}
    for name in first:
        parts = name.split("/")
        kinds.setdefault("/".join([*parts[:3], parts[-1]] if parts[1] == "parts" else parts[:2]), []).append(name)
    assert {"/lora", "/motion", "/target_motion", "/heads", "/parts/student/exp_avg"} <= kinds.keys()
    for kind, names in kinds.items():
        one, other = (torch.cat([values[name].double().flatten() for name in names]) for values in (first, second))
        tolerance = 1e-4 if "exp_avg" in kind else 1e-5
        assert (one - other).norm() <= tolerance * one.norm(), f"{kind} differ by {(one - other).norm() / one.norm()}"
