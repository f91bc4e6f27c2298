"""Rows of `training.py`: a step of a mid-size model with a cache and without, and with checkpointing and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import Row

CAPTION = "a clip of number {}, in which a red circle moves left before a white wall and a dog looks on"
FRAMES, STEPS = 8, 6  # the steps are even in number: of two clips one starts a trajectory


def _sizes(small: bool) -> dict[str, Any]:
    """The released widths by four or five, so that the encoder has its share of a step."""
    unet, vae, width, pixels = (
        ((32, 32), (32, 32), 64, 32) if small else ((64, 128, 256, 256), (32, 64, 128, 128), 256, 128)
    )
    return dict(unet=unet, vae=vae, width=width, pixels=pixels)


def _denoiser(base_model: str, sizes: dict[str, Any]) -> Any:
    """A UNet3D or a motion UNet of these widths, each architecture as it is released."""
    from diffusers import UNet3DConditionModel, UNetMotionModel

    levels = len(sizes["unet"])
    options: dict[str, Any] = dict(
        sample_size=sizes["pixels"] // 2 ** (levels - 1),
        block_out_channels=sizes["unet"],
        cross_attention_dim=sizes["width"],
    )
    if base_model == "modelscope":
        options["down_block_types"] = ("CrossAttnDownBlock3D",) * (levels - 1) + ("DownBlock3D",)
        options["up_block_types"] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (levels - 1)
        return UNet3DConditionModel(attention_head_dim=16, **options)
    options["down_block_types"] = ("CrossAttnDownBlockMotion",) * (levels - 1) + ("DownBlockMotion",)
    options["up_block_types"] = ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * (levels - 1)
    return UNetMotionModel(num_attention_heads=4, motion_num_attention_heads=4, **options)


def _prepare(base_model: str) -> Callable[[Path, bool], None]:
    """What writes a base of that architecture and the clips."""

    def prepare(folder: Path, small: bool) -> None:
        import torch
        from diffusers import AutoencoderKL
        from random_weights import PIPELINES, scheduler_config
        from transformers import CLIPTextConfig, CLIPTextModel

        from diffusers_mcm import MCMPipeline, MCMScheduler

        sizes = _sizes(small)
        levels, width = len(sizes["unet"]), sizes["width"]
        tokenizer = MCMPipeline.from_pretrained("mcm-shapes").tokenizer
        torch.manual_seed(0)
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2 if small else 12,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
        )
        PIPELINES[base_model](
            unet=_denoiser(base_model, sizes),
            vae=AutoencoderKL(block_out_channels=sizes["vae"], layers_per_block=2, **blocks),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            scheduler=MCMScheduler(**scheduler_config(base_model)),
        ).save_pretrained(folder / "base")
        _film_clips(folder)

    return prepare


def _film_clips(folder: Path) -> None:
    from training_data import _film, _write_table

    videos = folder / "videos"
    videos.mkdir()
    names = [f"{number}.mp4" for number in range(4 * STEPS)]
    for number, name in enumerate(names):
        _film(videos / name, 64, 64, 0.5, seed=number)
    _write_table(videos, names)


def _step(variant: str, label: str) -> Callable[[Path, bool], dict[str, float]]:
    """What measures the processor time of steps with and without a variant, on the same batches, in turns."""

    def measure(folder: Path, small: bool) -> dict[str, float]:
        from diffusers_mcm.training.loop import Trainer

        setting = {"cache_latents": str(folder / "cache"), "gradient_checkpointing": True}[variant]
        runs = {name: Trainer(_config(folder, small, name, options)) for name, options in
                (("without", {}), ("with", {variant: setting}))}  # fmt: skip
        batches = {name: iter(trainer.batches) for name, trainer in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(2 if small else STEPS + 1):
            for name, trainer in runs.items():
                batch = next(batches[name])
                begun = time.process_time()
                trainer.backward(batch)
                trainer.update()
                seconds[name].append(time.process_time() - begun)
        medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first one warms up
        return {
            f"s of the processor without {label}": medians["without"],
            "s of the processor with it": medians["with"],
            "with / without": medians["with"] / medians["without"],
        }

    return measure


def _config(folder: Path, small: bool, name: str, options: dict[str, Any]) -> Any:
    from diffusers_mcm.training.config import TrainingConfig

    pixels = _sizes(small)["pixels"]
    return TrainingConfig(
        pretrained_teacher_model=str(folder / "base"),
        discriminator_features="mcm-shapes-features",
        discriminator_text="mcm-shapes-clip",
        video_data=str(folder / "videos"),
        output_dir=str(folder / name / str(time.time_ns())),
        num_frames=FRAMES,
        frame_interval=1,
        height=pixels,
        width=pixels,
        train_batch_size=2,
        max_train_steps=STEPS + 1,
        lr_warmup_steps=0,
        dataloader_num_workers=0,
        report_to="none",
        checkpointing_steps=0,
        **options,
    )


def _checkpointed(base_model: str) -> Row:
    measure = _step("gradient_checkpointing", "checkpointing")
    return Row(measure, _prepare(base_model), {"with / without": "≤ 1.35"})


ROWS = {
    "a step with a cache": Row(
        _step("cache_latents", "a cache"), _prepare("modelscope"), {"with / without": "≤ 0.93"}
    ),
    "a checkpointed step, ModelScope": _checkpointed("modelscope"),
    "a checkpointed step, AnimateDiff": _checkpointed("animatediff"),
}
