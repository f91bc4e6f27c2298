"""Everything a run computes with, made from its configuration."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..base_models import BaseModel, get_base_model, infer_base_model
from ..consistency import SIGMA_DATA
from ..distillation.discriminator import MIN_FRAME_AREA, MIN_IMAGE_AREA, Discriminator
from ..distillation.draws import sample_generator
from ..distillation.motion import build_motion
from ..distillation.student import Student
from ..location import Location
from ..lora import (
    MOTION_HEAD_NAME,
    add_lora,
    check_fits,
    lora_disabled,
    open_safetensors,
    read_lora,
    set_lora_state_dict,
)
from ..lora.fused import fused
from .config import TrainingConfig
from .text import CachedTextEncoder

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """What is trained, what it is trained with, and the sizes they work at."""

    base: BaseModel
    student: Student
    text: CachedTextEncoder
    discriminator: Discriminator | None
    discriminator_text: CachedTextEncoder | None
    scheduler: SchedulerMixin
    guidance_range: tuple[float, float]
    clip_size: tuple[int, int, int]  # frames, height, width in pixels
    latent_shape: tuple[int, int, int, int]  # C, T, h, w
    extra_repositories: dict[str, str]  # where parts of the teacher lie that are not in its own repository


def find_base_model(config: TrainingConfig) -> BaseModel:
    """The row of `BASE_MODELS` for the teacher: as named, or as its `model_index.json` says."""
    if config.base_model is not None:
        return get_base_model(config.base_model)
    index = Location.of(config.pretrained_teacher_model, revision=config.revision).json("model_index.json")
    if index is None:
        raise ValueError(
            f"--pretrained_teacher_model {config.pretrained_teacher_model!r} has no model_index.json; "
            "expected the folder or repository of a text-to-video pipeline."
        )
    return infer_base_model(model_index=index)


def extra_repositories(base: BaseModel, config: TrainingConfig) -> dict[str, str]:
    """`--extra_repositories` as a dictionary."""
    given = dict(entry.partition("=")[::2] for entry in config.extra_repositories)
    for name, repository in given.items():
        if name not in base.extra_repositories or not repository:
            known = ", ".join(base.extra_repositories) or "none"
            raise ValueError(
                f"--extra_repositories takes name=repository, with the parts of {base.name} that may lie elsewhere"
                f" ({known}) as names; got {name!r}={repository!r}."
            )
    return given


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Key torch's global generator too, for libraries that initialise weights from it; restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sample_generator(seed, purpose, 0).initial_seed())
        yield


def build_networks(config: TrainingConfig, device: torch.device) -> Networks:
    base = find_base_model(config)
    dtype = WEIGHT_DTYPES[config.mixed_precision]
    parts = base.load(
        config.pretrained_teacher_model,
        revision=config.revision,
        dtype=dtype,
        variant=config.variant,
        extra_repositories=extra_repositories(base, config),
    )
    clip_size = tuple(
        getattr(config, name) or parts.sampling.get(name) or getattr(base, name)
        for name in ("num_frames", "height", "width")
    )
    latent_shape = tuple(base.latent_shape(parts.denoiser, parts.vae, *clip_size))

    add_lora(
        parts.denoiser,
        base.lora_target_modules(parts.denoiser),
        config.lora_rank,
        config.lora_alpha,
        generator=sample_generator(config.seed, "lora", 0),
    )
    with seeded(config.seed, "motion"):
        motion = build_motion(config.motion, latent_shape[0])
    if config.pretrained_lora:
        start_from_pretrained(parts.denoiser, motion, config)
    if config.gradient_checkpointing:
        base.enable_gradient_checkpointing(parts.denoiser)
    path = base.noise_path(
        parts.scheduler_config, timestep_scaling=config.timestep_scaling, sigma_data=config.sigma_data
    )
    # Evaluation mode throughout: dropout would be noise that belongs to no sample.
    student = Student(
        base,
        parts.denoiser,
        parts.vae,
        path,
        motion,
        config,
        teacher=partial(lora_disabled, parts.denoiser),
        fused=partial(fused, parts.denoiser) if config.fold_lora else None,
    )
    student.eval().to(device)
    text_encoder = parts.text_encoder.to(device)

    discriminator = discriminator_text = None
    if config.adversarial:
        discriminator = Discriminator.from_pretrained(
            config.discriminator_features,
            config.discriminator_text,
            generator=sample_generator(config.seed, "discriminator", 0),
            dtype=dtype,
            augmentation=config.discriminator_augmentation,
            crop=config.discriminator_crop,
            min_crop_area=MIN_FRAME_AREA if config.image_data is None else MIN_IMAGE_AREA,
        ).to(device)
        discriminator_text = CachedTextEncoder(lambda prompts: {"embedding": discriminator.encode_text(prompts)})
    return Networks(
        base=base,
        student=student,
        text=CachedTextEncoder(lambda prompts: base.encode_text(parts.tokenizer, text_encoder, prompts)),
        discriminator=discriminator,
        discriminator_text=discriminator_text,
        scheduler=build_scheduler(base, parts.scheduler_config, config),
        guidance_range=guidance_range(base, config),
        clip_size=clip_size,
        latent_shape=latent_shape,
        extra_repositories=parts.extra_repositories,
    )


def start_from_pretrained(denoiser: nn.Module, motion: nn.Module, config: TrainingConfig) -> None:
    """Overwrite a fresh LoRA with `--pretrained_lora`, and the motion head with the one beside it, if there is one."""
    location = Location.of(config.pretrained_lora, subfolder=config.pretrained_lora_subfolder)
    lora = read_lora(location)
    check_fits(denoiser, lora)
    ranks = sorted(set(lora.ranks().values()))
    alpha = lora.alpha if lora.alpha is not None else ranks[-1]
    if ranks != [config.lora_rank] or alpha != config.lora_alpha or lora.alpha_pattern or lora.use_rslora:
        raise ValueError(
            f"{lora.source} has rank {', '.join(map(str, ranks))} and alpha {alpha:g}, and --lora_rank is"
            f" {config.lora_rank} and --lora_alpha {config.lora_alpha:g}: they must be the same, for all its modules."
        )
    set_lora_state_dict(denoiser, lora.tensors)
    head = None if location.is_file else location.file(MOTION_HEAD_NAME)
    if head is not None:
        with open_safetensors(head) as file:
            if (file.metadata() or {}).get("motion") == config.motion:
                names = [name for name in file.keys() if name.startswith("motion.")]
                motion.load_state_dict({name.removeprefix("motion."): file.get_tensor(name) for name in names})


def guidance_range(base: BaseModel, config: TrainingConfig) -> tuple[float, float]:
    return base.guidance_range if config.guidance_min is None else (config.guidance_min, config.guidance_max)


def build_scheduler(base: BaseModel, scheduler_config: dict[str, Any], config: TrainingConfig) -> SchedulerMixin:
    """The sampler that fits this training: the teacher's noise schedule, the student's grid and boundary."""
    return base.scheduler_class.from_config(
        scheduler_config,
        # Schedulers have σ_d = 0.5 for good; eq. 1 depends on timestep_scaling / σ_d only.
        timestep_scaling=config.timestep_scaling * SIGMA_DATA / config.sigma_data,
        original_inference_steps=config.num_solver_steps,
        clip_sample=False,
        thresholding=False,
    )


def describe(networks: Networks) -> str:
    """A line or two for the log: what is trained, at which size."""
    trained = {"LoRA and motion head": networks.student, "discriminator": networks.discriminator}
    counts = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in trained.items()
        if module is not None
    }
    sizes = dict(zip(("frames", "height", "width"), networks.clip_size))
    return f"base model {networks.base.name}, clips {json.dumps(sizes)}, trained parameters {json.dumps(counts)}"
