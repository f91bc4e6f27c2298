"""A whole tiny world on disk: base model, discriminator networks, mp4s and pictures; and the flags that name them."""

import csv
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.networks import WEIGHT_DTYPES, build_networks
from diffusers_mcm.video_io import write_mp4
from tests.distillation.discriminator.tiny import tiny_clip_text, tiny_dinov2
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
        dataloader_num_workers=0,
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


def stop_in_step_two(config: TrainingConfig) -> None:
    """A run that is interrupted after step 1, before the second update."""

    class Stopped(Trainer):
        def update(self):
            if self.step == 1:
                raise KeyboardInterrupt
            return super().update()

    with pytest.raises(KeyboardInterrupt):
        Stopped(config).train()


def flatten(state: dict) -> dict[str, torch.Tensor]:
    """Every tensor and number that training changes, by the path of keys that leads to it."""
    flat = {}

    def walk(path: str, value) -> None:
        if isinstance(value, torch.Tensor):
            flat[path] = value.detach().clone()
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{path}/{key}", inner)
        elif isinstance(value, int | float) and path != "/seconds":
            flat[path] = torch.tensor(value, dtype=torch.float64)

    walk("", state)
    return flat


# The method's own settings and the paper's learning rates: a split batch must do what a whole one does under these.
SPLIT = dict(max_train_steps=2, learning_rate=5e-6, discriminator_learning_rate=5e-5)


@contextmanager
def double_precision() -> Iterator[None]:
    """Runs compute in float64, so that rounding hides nothing: what is left of a difference is a mistake.

    The penalty's weight grows after the first step, however small the penalty is.
    """

    def build_in_double(config, device, *rest):
        built = build_networks(config, device, *rest)
        built.student.double()
        built.discriminator.double()
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setitem(WEIGHT_DTYPES, "no", torch.float64)
        patch.setattr("diffusers_mcm.training.run.build_networks", build_in_double)
        patch.setattr("diffusers_mcm.distillation.discriminator.penalty.GROWTH_THRESHOLD", 0.0)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def assert_same_training(start: dict, first: dict, second: dict, double: bool) -> None:
    """Two runs from `start` are one: weights, their *changes*, and the optimisers' moments, that is the gradients.

    In float64 all agree to 1e-9 of their norm. In float32 weights agree to 1e-5, and so does the discriminator's
    gradient. The student's agrees to 2e-3 only, whatever computes it: the gradient of the pseudo-Huber distance turns
    from -1 to 1 within a few c = 0.001, and guidance of up to 15 blows up the rounding of what is compared. AdamW then
    divides by the gradient's own size, where that is rounding too: the changes agree to 5e-2. The float64 runs show
    that there is nothing else in these figures (they differ by 2e-13 and 1e-11, 1e-9 times as much).
    """
    assert start.keys() <= first.keys() == second.keys()
    kinds: dict[str, list[str]] = {}
    for name in first:
        parts = name.split("/")
        kinds.setdefault("/".join([*parts[:3], parts[-1]] if parts[1] == "parts" else parts[:2]), []).append(name)
    weights = {"/lora", "/motion", "/target_motion", "/heads"}
    assert weights | {"/parts/student/exp_avg", "/parts/discriminator/exp_avg"} <= kinds.keys()
    for kind, names in kinds.items():
        begin, one, other = (
            torch.cat([values[name].double().flatten() for name in names]) if values.keys() >= set(names) else 0.0
            for values in (start, first, second)
        )
        difference, student = (one - other).norm(), "discriminator" not in kind
        tolerance = 1e-9 if double else 2e-3 if "exp_avg" in kind and student else 1e-5
        assert difference <= tolerance * one.norm(), f"{kind} differ by {difference / one.norm():.1e}"
        if kind in weights:
            change, tolerance = (one - begin).norm(), 1e-9 if double else 5e-2
            assert 0 < change and difference <= tolerance * change, f"{kind} changed by {difference / change:.1e}"
