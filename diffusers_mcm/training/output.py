"""The folder a run leaves behind: LoRA, configuration, scheduler, motion head and card."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..lora import CONFIG_NAME, save_lora, write_safetensors
from .card import write_card
from .config import TrainingConfig
from .networks import Networks

MOTION_HEAD_NAME = "motion_head.safetensors"
CARD_NAME = "README.md"
# What only says where a run put its files, or is secret, is not part of how the LoRA was made.
_NOT_RECORDED = frozenset(
    "output_dir logging_dir resume_from_checkpoint report_to push_to_hub hub_model_id hub_private_repo".split()
)
_SOURCES = "pretrained_teacher_model discriminator_features discriminator_text video_data image_data".split()
_SAVE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def recorded_training(
    config: TrainingConfig, networks: Networks, folder: Path, progress: dict[str, Any]
) -> dict[str, Any]:
    """The configuration as it goes beside the weights in `folder`: ids as they are, local paths relative to it."""
    training = {key: value for key, value in config.to_dict().items() if key not in _NOT_RECORDED}
    for name in _SOURCES:
        if training[name] is not None:
            training[name] = _recordable_source(training[name], folder)
    training["num_frames"], training["height"], training["width"] = networks.clip_size
    training["guidance_min"], training["guidance_max"] = networks.guidance_range
    training["base_model"] = networks.base.name
    return {**training, **progress}


def _recordable_source(source: str, folder: Path) -> str:
    """Like `hub.recordable`, and for globs too: never an absolute path."""
    if os.path.isabs(source) and not os.path.exists(source):
        return Path(os.path.relpath(source, folder.resolve())).as_posix()
    return hub.recordable(source, folder)


def write_lora_folder(
    folder: Path,
    config: TrainingConfig,
    networks: Networks,
    progress: dict[str, Any],
    title: str,
    repository: str,
    overview: str | None = None,
    relative_to: Path | None = None,
) -> None:
    """All that `MCMPipeline.from_pretrained(folder)` and a reader need. `progress` is recorded with the training.

    Local paths are recorded relative to `relative_to`, where the files will be moved; default: they stay in `folder`.
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
    base_model = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["base_model_repository"]
    prompt = config.validation_prompts[0] if config.validation_prompts else None
    card = write_card(title, repository, base_model, training, config.license, prompt, overview)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def motion_head(networks: Networks) -> dict[str, torch.Tensor]:
    """The head's weights and its moving average's; empty for a representation without weights."""
    student = networks.student
    heads = {"motion": student.motion, "target_motion": student.target_motion}
    return {
        f"{prefix}.{key}": value.detach().cpu().contiguous()
        for prefix, head in heads.items()
        for key, value in head.state_dict().items()
    }


def push_to_hub(folder: Path, config: TrainingConfig) -> str:
    """Upload the folder, without checkpoints and logs; the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=config.hub_token)
    repository = config.hub_model_id or folder.resolve().name
    repository = api.create_repo(repository, private=config.hub_private_repo or None, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Upload the motion consistency LoRA",
        ignore_patterns=["checkpoint-*", "checkpoint-*/**", f"{config.logging_dir}/**", ".*"],
    )
    return commit.commit_url
