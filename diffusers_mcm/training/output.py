"""The folder a run leaves behind: LoRA, configuration, scheduler, motion head and card."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cards import CARD_NAME, render_folder_card
from ..files import write_text
from ..hub import is_local, recordable
from ..location import MOTION_HEAD_NAME
from ..lora import LoRA, extract_lora, write_safetensors
from ..lora import write_lora_folder as write_lora_files
from ..publish import Destination, PublishError, open_repository, publish_lora, put_sample
from ..settings import SamplingDefaults, Settings
from .config import TrainingConfig
from .networks import TrainingNetworks

_SAVE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def write_lora_folder(
    folder: Path,
    config: TrainingConfig,
    networks: TrainingNetworks,
    progress: dict[str, Any],
    sample: tuple[str, np.ndarray] | None = None,
    relative_to: Path | None = None,
) -> LoRA:
    """Write all that `MCMPipeline.from_pretrained(folder)` needs. `progress` is recorded with the training.

    `sample` is a prompt and its clip (T, H, W, 3) uint8. Local paths are recorded relative to `relative_to`, where the
    files will be moved; default: they stay in `folder`. Returns the LoRA as it is in the folder.
    """
    names = ("num_frames", "height", "width", "guidance_min", "guidance_max", "base_model")
    found = dict(zip(names, (*networks.clip_size, *networks.guidance_range, networks.base_model.name)))
    values, fps = config.to_dict(), config.fps or networks.pipeline.sampling_default("fps")
    recorded = {name: values[name] for name in config.names(recorded=True)}
    lora = extract_lora(networks.student.denoiser).cast(_SAVE_DTYPES[config.save_dtype])
    lora.settings = Settings(
        base_model=networks.base_model.name,
        base_model_repository=config.pretrained_teacher_model,
        base_model_revision=config.revision,
        extra_repositories=networks.extra_repositories,
        expert=config.expert,
        boundary=networks.boundary,
        sampling=SamplingDefaults(config.num_inference_steps, *networks.clip_size, fps),
    ).trained(recorded | found | progress, relative_to or folder)
    lora.scheduler_config = json.loads(networks.pipeline.scheduler.to_json_string())
    lora.folder = relative_to or folder
    if sample is not None:
        folder.mkdir(parents=True, exist_ok=True)
        lora.settings = put_sample(folder, lora.settings, sample[1], sample[0], fps)
    write_lora_files(folder, lora, networks.base_model.denoiser_name)
    write_safetensors(folder / MOTION_HEAD_NAME, motion_head(networks), {"format": "pt", "motion": config.motion})
    name = Path(config.output_dir).resolve().name
    write_text(folder / CARD_NAME, render_folder_card(folder, name, lora.settings))
    return lora


def motion_head(networks: TrainingNetworks) -> dict[str, torch.Tensor]:
    """The head's weights and its moving average's; empty for a representation without weights."""
    heads = {name: networks.changed[name].state_dict() for name in ("motion", "target_motion")}
    return {f"{name}.{key}": value.cpu().contiguous() for name, head in heads.items() for key, value in head.items()}


def prepare_push(config: TrainingConfig) -> None:
    """Fail before the training, not after it: create the repository, which needs the token that will be needed."""
    later = f" and then run: {push_command(config)} --base_model owner/name"
    for what, place in {"base model": config.pretrained_teacher_model, **config.extra_places}.items():
        if is_local(recordable(place, Path(config.output_dir))):
            raise ValueError(
                f"With --push_to_hub others will load the {what}, but {place!r} is a folder of this machine. Name its"
                f" repository, or train without --push_to_hub{later if what == 'base model' else ''}."
            )
    open_repository(_destination(config))


def unusable(config: TrainingConfig, prompt: str) -> str:
    """What to say at the end of a run whose LoRA makes NaN."""
    published = f" It was not published; that would be: {push_command(config)}." if config.push_to_hub else ""
    return (
        f"The training is done and its LoRA is in {config.output_dir}, but what it makes of {prompt!r} is not finite"
        f" (the log says more), so it has no sample clip.{published} Try it in another precision (dtype=torch.bfloat16"
        " or torch.float32) before it is used."
    )


def push_to_hub(config: TrainingConfig, lora: LoRA) -> str:
    """Publish the output folder, which holds this LoRA; the address of the commit."""
    try:
        return publish_lora(config.output_dir, _destination(config), lora=lora)
    except PublishError as error:
        raise PublishError(
            f"{error} The LoRA is in {config.output_dir}; publish it with: {push_command(config)}"
        ) from None


def _destination(config: TrainingConfig) -> Destination:
    return Destination(
        hub_repository(config),
        private=config.hub_private_repo or None,
        token=config.hub_token,
        overwrite_card=config.overwrite_card,
    )


def hub_repository(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name


def push_command(config: TrainingConfig) -> str:
    """The command that does the same as --push_to_hub, later."""
    flags = ["--private"] if config.hub_private_repo else []
    flags += ["--overwrite_card"] if config.overwrite_card else []
    return shlex.join(["diffusers-mcm", "push", config.output_dir, hub_repository(config), *flags])
