"""The folder a run leaves behind: LoRA, configuration, scheduler, motion head and card."""

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import hub
from ..cards import CARD_NAME, SOURCES, is_local, render_folder_card
from ..lora import MOTION_HEAD_NAME, save_lora, write_safetensors
from ..publish import PublishError, open_repository, publish_lora, record_sample
from .config import TrainingConfig
from .networks import Networks

# What only says where a run put its files, or is secret, is not part of how the LoRA was made.
_NOT_RECORDED = frozenset(
    "output_dir logging_dir resume_from_checkpoint report_to push_to_hub hub_model_id hub_private_repo "
    "overwrite_card".split()
)
_SAVE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def recorded_training(
    config: TrainingConfig, networks: Networks, folder: Path, progress: dict[str, Any]
) -> dict[str, Any]:
    """The configuration as it goes beside the weights in `folder`: ids as they are, local paths relative to it."""
    training = {key: value for key, value in config.to_dict().items() if key not in _NOT_RECORDED}
    for name in SOURCES:
        if training[name] is not None:
            training[name] = recordable_source(training[name], folder)
    training["num_frames"], training["height"], training["width"] = networks.clip_size
    training["guidance_min"], training["guidance_max"] = networks.guidance_range
    training["base_model"] = networks.base.name
    training["extra_repositories"] = {
        name: recordable_source(place, folder) for name, place in networks.extra_repositories.items()
    }
    return {**training, **progress}


def recordable_source(source: str, folder: Path) -> str:
    """Like `hub.recordable`, and for globs too: never an absolute path."""
    if os.path.isabs(source) and not os.path.exists(source):
        return Path(os.path.relpath(source, folder.resolve())).as_posix()
    return hub.recordable(source, folder)


def write_lora_folder(
    folder: Path,
    config: TrainingConfig,
    networks: Networks,
    progress: dict[str, Any],
    name: str,
    sample: tuple[str, np.ndarray] | None = None,
    relative_to: Path | None = None,
) -> None:
    """All that `MCMPipeline.from_pretrained(folder)` and a reader need. `progress` is recorded with the training.

    `name` is the model's in its card, `sample` a prompt and its clip (T, H, W, 3) uint8. Local paths are recorded
    relative to `relative_to`, where the files will be moved; default: they stay in `folder`.
    """
    num_frames, height, width = networks.clip_size
    relative_to = relative_to or folder
    training = recorded_training(config, networks, relative_to, progress)
    save_lora(
        folder,
        networks.student.denoiser,
        networks.base,
        repository=config.pretrained_teacher_model,
        revision=config.revision,
        extra_repositories=networks.extra_repositories,
        sampling={
            "num_inference_steps": config.num_inference_steps,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "fps": config.fps,
        },
        training=training,
        scheduler=networks.scheduler,
        dtype=_SAVE_DTYPES[config.save_dtype],
        relative_to=relative_to,
    )
    write_safetensors(folder / MOTION_HEAD_NAME, motion_head(networks), {"format": "pt", "motion": config.motion})
    if sample is not None:
        record_sample(folder, sample[1], sample[0], config.fps)
    (folder / CARD_NAME).write_text(render_folder_card(folder, name), encoding="utf-8")


def motion_head(networks: Networks) -> dict[str, torch.Tensor]:
    """The head's weights and its moving average's; empty for a representation without weights."""
    student = networks.student
    heads = {"motion": student.motion, "target_motion": student.target_motion}
    return {
        f"{prefix}.{key}": value.detach().cpu().contiguous()
        for prefix, head in heads.items()
        for key, value in head.state_dict().items()
    }


def prepare_push(config: TrainingConfig) -> None:
    """Fail before the training, not after it: create the repository, which needs the token that will be needed."""
    folder = Path(config.output_dir)
    if is_local(hub.recordable(config.pretrained_teacher_model, folder)):
        raise ValueError(
            f"With --push_to_hub others will load the base model, but {config.pretrained_teacher_model!r} is a folder"
            " of this machine. Name its repository as --pretrained_teacher_model, or train without --push_to_hub and"
            f" then run: {push_command(config)} --base_model owner/name"
        )
    for entry in config.extra_repositories:
        name, _, place = entry.partition("=")
        if is_local(hub.recordable(place, folder)):
            raise ValueError(
                f"With --push_to_hub others will load the {name}, but {place!r} is a folder of this machine. Name its"
                " repository in --extra_repositories, or train without --push_to_hub."
            )
    open_repository(hub_repository(config), private=config.hub_private_repo or None, token=config.hub_token)


def unusable(config: TrainingConfig, prompt: str) -> str:
    """What to say at the end of a run whose LoRA makes NaN."""
    published = f" It was not published; that would be: {push_command(config)}." if config.push_to_hub else ""
    return (
        f"The training is done and its LoRA is in {config.output_dir}, but what it makes of {prompt!r} is not finite"
        f" (the log says more), so it has no sample clip.{published} Try it in another precision (dtype=torch.bfloat16"
        " or torch.float32) before it is used."
    )


def push_to_hub(config: TrainingConfig) -> str:
    """Publish the output folder; the address of the commit."""
    try:
        return publish_lora(
            config.output_dir,
            hub_repository(config),
            private=config.hub_private_repo or None,
            token=config.hub_token,
            overwrite_card=config.overwrite_card,
        )
    except PublishError as error:
        raise PublishError(
            f"{error} The LoRA is in {config.output_dir}; publish it with: {push_command(config)}"
        ) from None


def hub_repository(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name


def push_command(config: TrainingConfig) -> str:
    """What does the same as --push_to_hub, later."""
    flags = ["--private"] if config.hub_private_repo else []
    flags += ["--overwrite_card"] if config.overwrite_card else []
    return shlex.join(["diffusers-mcm", "push", config.output_dir, hub_repository(config), *flags])
