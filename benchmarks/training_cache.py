"""A row of `training.py`: a step of a mid-size model with clips and texts out of a cache, and without."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from training import Row

CAPTION = "a clip of number {}, in which a red circle moves left before a white wall and a dog looks on"
FRAMES, STEPS = 8, 6  # the steps are even in number: of two clips one starts a trajectory


def _sizes(small: bool) -> dict[str, Any]:
    """ModelScope's widths by four or five, so that the encoder has its share of a step."""
    unet, vae, width, pixels = (
        ((32, 32), (32, 32), 64, 32) if small else ((64, 128, 256, 256), (32, 64, 128, 128), 256, 128)
    )
    return dict(unet=unet, vae=vae, width=width, pixels=pixels)


def _prepare(folder: Path, small: bool) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from random_weights import scheduler_config
    from training_data import _film, _write_table
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusers_mcm import MCMPipeline, MCMScheduler, ModelScopeMCMPipeline

    sizes = _sizes(small)
    levels, width, tokenizer = len(sizes["unet"]), sizes["width"], MCMPipeline.from_pretrained("mcm-shapes").tokenizer
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=sizes["pixels"] // 2 ** (levels - 1),
        block_out_channels=sizes["unet"],
        down_block_types=("CrossAttnDownBlock3D",) * (levels - 1) + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (levels - 1),
        cross_attention_dim=width,
        attention_head_dim=16,
    )
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    vae = AutoencoderKL(block_out_channels=sizes["vae"], layers_per_block=2, **blocks)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler = MCMScheduler(**scheduler_config("modelscope"))
    networks = dict(unet=unet, vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=scheduler)
    ModelScopeMCMPipeline(**networks).save_pretrained(folder / "base")
    videos = folder / "videos"
    videos.mkdir()
    names = [f"{number}.mp4" for number in range(4 * STEPS)]
    for number, name in enumerate(names):
        _film(videos / name, 64, 64, 0.5, seed=number)
    _write_table(videos, names)


def _step(folder: Path, small: bool) -> dict[str, float]:
    """Processor time of steps on the same batches, which take turns."""
    from diffusers_mcm.training.config import TrainingConfig
    from diffusers_mcm.training.loop import Trainer

    pixels, runs = _sizes(small)["pixels"], {}
    for name, cache in (("without", {}), ("with", {"cache_latents": str(folder / "cache")})):
        config = TrainingConfig(
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
            **cache,
        )
        runs[name] = Trainer(config)
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
        "s of the processor without a cache": medians["without"],
        "s of the processor with one": medians["with"],
        "with / without": medians["with"] / medians["without"],
    }


ROWS = {"a step with a cache": Row(_step, _prepare, {"with / without": "≤ 0.93"})}
