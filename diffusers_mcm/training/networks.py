"""Everything a run computes with, made from its configuration."""

import importlib
import json
import os
import shlex
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import hub
from ..base_models import BaseModel, get_base_model, infer_base_model
from ..distillation.discriminator import Discriminator
from ..distillation.discriminator.augment import MIN_FRAME_AREA, MIN_IMAGE_AREA
from ..distillation.draws import sample_generator
from ..distillation.motion import build_motion
from ..distillation.student import Student
from ..features import PatchFeatures, TextFeatures, TextSize, text_dimension
from ..location import Location, check_whole
from ..lora import (
    MOTION_HEAD_NAME,
    LoRA,
    add_lora,
    check_fits,
    fused,
    lora_disabled,
    lora_state_dict,
    open_safetensors,
    read_loras,
    set_lora_state_dict,
    train_only,
)
from ..pipelines import MCMPipeline
from ..pipelines.loading import how_to_unpack, is_checkpoint, read_base_index
from ..settings import EXPERTS, HIGH_NOISE
from .caching import LatentCache
from .config import TrainingConfig
from .defaults import student_settings, with_base_defaults
from .stored import StoredTexts
from .text import CachedTextEncoder, EncodeTexts, build_text_encoder

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TrainingNetworks:
    """What is trained, what it is trained with, and the sizes they work at."""

    pipeline: MCMPipeline  # its denoiser is the student's: it samples as the LoRA will be sampled
    student: Student
    text: EncodeTexts
    discriminator: Discriminator | None
    discriminator_text: EncodeTexts | None
    guidance_range: tuple[float, float]
    clip_size: tuple[int, int, int]  # frames, height, width in pixels
    latent_shape: tuple[int, int, int, int]  # C, T, h, w
    extra_repositories: dict[str, str]  # where components of the teacher lie that are not in its own repository
    boundary: float | None = None  # of a teacher with two experts, the σ where they meet

    @property
    def base_model(self) -> BaseModel:
        return self.pipeline.base_model

    @property
    def changed(self) -> dict[str, nn.Module]:
        """The modules that a run changes, apart from the denoiser."""
        modules = {"motion": self.student.motion, "target_motion": self.student.target_motion}
        return modules if self.discriminator is None else {**modules, **self.discriminator.trained}

    def state_dict(self) -> dict[str, Any]:
        """The weights that a run changes."""
        changed = {name: module.state_dict() for name, module in self.changed.items()}
        return {"lora": lora_state_dict(self.student.denoiser), **changed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the weights of a run, in place."""
        set_lora_state_dict(self.student.denoiser, state["lora"])
        for name, module in self.changed.items():
            module.load_state_dict(state[name])

    def summary(self) -> str:
        """A line or two for the log: what is trained, at which size."""
        trained = {"LoRA and motion head": self.student, "discriminator": self.discriminator}
        modules = {name: module for name, module in trained.items() if module is not None}
        counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in modules.items()}
        sizes = dict(zip(("frames", "height", "width"), self.clip_size))
        return f"base model {self.base_model.name}, clips {json.dumps(sizes)}, trained parameters {json.dumps(counts)}"


def build_networks(config: TrainingConfig, device: torch.device, cache: LatentCache | None = None) -> TrainingNetworks:
    """The teacher as a pipeline, the student that shares its networks, and the discriminator if there is one.

    With a cache, which has all clips and texts, no text encoder is loaded, and the VAE is left without its encoder.
    """
    pipeline, extra_repositories = load_teacher(config, with_text=cache is None)
    base = pipeline.base_model
    if cache is not None:
        base.drop_encoder(pipeline.vae)
    config = with_base_defaults(config, base)
    num_frames, height, width = (
        getattr(config, name) or pipeline.sampling_default(name) for name in ("num_frames", "height", "width")
    )
    latent_shape = base.latent_shape(pipeline.denoiser, pipeline.vae, num_frames, height, width)
    text: EncodeTexts
    if cache is None:
        text = build_text(pipeline, device, config.offload_text_encoder)
    else:
        text = StoredTexts(cache.prompts, device)
    student = build_student(pipeline, config, latent_shape[0]).to(device)
    pipeline.to(device)
    boundary = pipeline.config.boundary_ratio if base.experts else None
    pipeline.scheduler = base.student_scheduler(
        pipeline.scheduler.config,
        num_solver_steps=config.method.num_solver_steps,
        **student_settings(config, base),
        **({} if boundary is None else {"boundary": boundary}),
    )
    discriminator: Discriminator | None = None
    discriminator_text: EncodeTexts | None = None
    if config.adversarial:
        discriminator = build_discriminator(config, with_text=cache is None)
        if cache is None:
            discriminator_text = build_discriminator_text(discriminator, device, config.offload_text_encoder)
        else:
            discriminator_text = StoredTexts(cache.judge, device)
        discriminator.to(device)
    low, high = config.guidance_min, config.guidance_max
    return TrainingNetworks(
        pipeline=pipeline,
        student=student,
        text=text,
        discriminator=discriminator,
        discriminator_text=discriminator_text,
        guidance_range=base.guidance_range_of(config.expert) if low is None or high is None else (low, high),
        clip_size=(num_frames, height, width),
        latent_shape=latent_shape,
        extra_repositories=extra_repositories,
        boundary=boundary,
    )


def build_text(pipeline: MCMPipeline, device: torch.device, offload: bool) -> CachedTextEncoder:
    """The encoder of captions; with `offload` the pipeline is left without it, or it would go to the device too."""
    network = pipeline.text_encoder
    if offload:
        pipeline.text_encoder = None
    return build_text_encoder(
        partial(pipeline.base_model.encode_text, pipeline.tokenizer, network), network, device, offload
    )


def build_discriminator_text(discriminator: Discriminator, device: torch.device, offload: bool) -> CachedTextEncoder:
    """The encoder of the texts that the discriminator reads; with `offload` the discriminator is left without it."""
    network = discriminator.text
    if offload:
        del discriminator.text
    return build_text_encoder(lambda prompts: {"embedding": network(prompts)}, network, device, offload)


def teacher_location(config: TrainingConfig) -> Location:
    return Location.of(config.pretrained_teacher_model, revision=config.revision)


def teacher_index(config: TrainingConfig) -> tuple[BaseModel, dict[str, Any]]:
    """The base model that the teacher is of, and its `model_index.json`; `ValueError` if there is no teacher."""
    location = teacher_location(config)
    if location.is_file:
        raise ValueError(f"--pretrained_teacher_model takes a folder or a repository; {_instead_of(location.name)}")
    index = read_base_index(location)
    base = infer_base_model(model_index=index)
    if config.base_model is not None and get_base_model(config.base_model).name != base.name:
        raise ValueError(
            f"--base_model is {config.base_model}, but {config.pretrained_teacher_model!r} holds a {base.name}."
        )
    return base, index


def components_elsewhere(config: TrainingConfig) -> dict[str, str]:
    """Where components of the teacher lie that are not in its own repository."""
    base, index = teacher_index(config)
    for name, repository in config.extra_places.items():
        if name not in base.extra_repositories or not repository:
            known = ", ".join(base.extra_repositories) or "none"
            raise ValueError(
                f"--extra_repositories takes name=repository, with the components of {base.name} that may lie"
                f" elsewhere ({known}) as names; got {name!r}={repository!r}."
            )
    return base.components_elsewhere(index) | config.extra_places


def _instead_of(file: str) -> str:
    if hub.is_pickled(file):
        return f"{file} is a file, and {hub.how_to_convert(file)}"
    if is_checkpoint(file):
        folder = os.path.splitext(file)[0]
        return (
            f"{file} is a single-file checkpoint. Make a folder of it, {how_to_unpack(file)}, and give"
            f" --pretrained_teacher_model {shlex.quote(folder)}"
        )
    return f"{file} is a file, and no checkpoint of a whole model: a LoRA to start from would be --pretrained_lora."


def load_teacher(config: TrainingConfig, with_text: bool = True) -> tuple[MCMPipeline, dict[str, str]]:
    """The teacher as a pipeline, and where its components lie that are not in its own repository.

    Of two experts it has but the one that is distilled, and text encoder and tokenizer only `with_text`.
    """
    extra, dtype = components_elsewhere(config), WEIGHT_DTYPES[config.precision]
    base, index = teacher_index(config)
    others: dict[str, Any] = {component: None for expert, component in base.experts.items() if expert != config.expert}
    others |= {} if with_text else {"text_encoder": None, "tokenizer": None}
    precise = {} if base.vae_dtype in (None, dtype) else {"vae": load_network("vae", config, index, base.vae_dtype)}
    pipeline = MCMPipeline.from_pretrained(
        config.pretrained_teacher_model,
        revision=config.revision,
        variant=config.variant,
        dtype=dtype,
        **others,
        **precise,
        **extra,
    )
    pipeline.unload_lora_weights()  # a saved pipeline may bring some; the teacher is the base model
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, extra


def load_network(name: str, config: TrainingConfig, index: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A network of the teacher by itself; `index` is its `model_index.json`."""
    variant = teacher_location(config).inside(name).variant(config.variant)
    return load_component(name, config, index, dtype=dtype, use_safetensors=True, **variant)


def load_component(name: str, config: TrainingConfig, index: dict[str, Any], **options: Any) -> Any:
    """A component of the teacher by itself, as the class that its `model_index.json`, `index`, names."""
    library, kind = index[name]
    location = teacher_location(config).inside(name)
    with location.never_pickled():
        component = getattr(importlib.import_module(library), kind)
        loaded = component.from_pretrained(location.name, **location.arguments, **options)
    check_whole(loaded, str(location))
    return loaded


def build_student(pipeline: MCMPipeline, config: TrainingConfig, channels: int) -> Student:
    """A student with a fresh LoRA on the pipeline's denoiser, or with `--pretrained_lora`; latents have `channels`."""
    base, denoiser = pipeline.base_model, pipeline.denoiser
    modules = base.lora_target_modules(denoiser)
    trained = trained_modules(base, modules, config.lora_modules)
    add_lora(
        denoiser,
        modules,
        config.lora_rank,
        config.lora_alpha,
        generator=sample_generator(config.seed, "lora", 0),
    )
    train_only(denoiser, trained)
    with torch.random.fork_rng(devices=[]):  # torch initialises modules from its global generator
        torch.manual_seed(sample_generator(config.seed, "motion", 0).initial_seed())
        motion = build_motion(config.motion, channels)
    if config.pretrained_lora:
        start_from_pretrained(config.pretrained_lora, denoiser, motion, config)
    if config.gradient_checkpointing:
        base.enable_gradient_checkpointing(denoiser)
        base.enable_decoder_checkpointing(pipeline.vae)
    path: Any = base.noise_path(pipeline.scheduler.config, **student_settings(config, base))
    if config.expert is not None:
        path = path.split(pipeline.config.boundary_ratio)[EXPERTS.index(config.expert)]
    fuse = partial(fused, denoiser) if config.fuse_lora else None
    teacher = partial(lora_disabled, denoiser)
    student = Student(base, denoiser, pipeline.vae, path, motion, config.method, teacher, fuse)
    return student.eval()  # throughout: dropout would be noise that belongs to no sample


def trained_modules(base: BaseModel, modules: list[str], wanted: str) -> list[str]:
    """Those of the LoRA's modules that `--lora_modules` says; ValueError if the base model tells no such apart."""
    if wanted == "all":
        return modules
    return [module for module in modules if base.is_temporal(module) == (wanted == "temporal")]


def build_discriminator(config: TrainingConfig, with_text: bool = True) -> Discriminator:
    """A discriminator with fresh heads on the frozen feature networks, that for texts only `with_text`."""
    dtype = WEIGHT_DTYPES[config.precision]
    name = config.discriminator_text
    text: Any = TextFeatures.from_pretrained(name, dtype=dtype) if with_text else TextSize(text_dimension(name))
    return Discriminator.with_fresh_heads(
        PatchFeatures.from_pretrained(config.discriminator_features, dtype=dtype),
        text,
        generator=sample_generator(config.seed, "discriminator", 0),
        judges_changes=config.lambda_change > 0,
        augmentation=config.discriminator_augmentation,
        crop=config.discriminator_crop,
        min_crop_area=MIN_FRAME_AREA if config.image_data is None else MIN_IMAGE_AREA,
    )


def start_from_pretrained(name: str, denoiser: nn.Module, motion: nn.Module, config: TrainingConfig) -> None:
    """Overwrite a fresh LoRA with the one called `name`, and the motion head with the one beside it, if any is."""
    location = Location.of(name, subfolder=config.pretrained_lora_subfolder)
    read = read_loras(location)
    lora = read if isinstance(read, LoRA) else read[EXPERTS.index(config.expert or HIGH_NOISE)]
    if lora.settings.expert != config.expert and lora.settings.expert is not None:
        raise ValueError(
            f"{lora.source} is for the {lora.settings.expert} expert, and --expert is {config.expert or 'not given'}."
        )
    check_fits(denoiser, lora)
    lora.check_no_differences("a training goes on with pairs of matrices alone")
    ranks = sorted(set(lora.ranks().values()))
    alpha = lora.alpha if lora.alpha is not None else ranks[-1]
    if ranks != [config.lora_rank] or alpha != config.lora_alpha or lora.alpha_pattern or lora.use_rslora:
        raise ValueError(
            f"{lora.source} has rank {', '.join(map(str, ranks))} and alpha {alpha:g}, and --lora_rank is"
            f" {config.lora_rank} and --lora_alpha {config.lora_alpha:g}: they must be the same, for all its modules."
        )
    set_lora_state_dict(denoiser, lora.tensors)
    head = None if location.is_file else location.file(MOTION_HEAD_NAME)
    if head is None:
        return
    with open_safetensors(head) as file:
        if (file.metadata() or {}).get("motion") == config.motion:
            names = [name for name in file.keys() if name.startswith("motion.")]
            motion.load_state_dict({name.removeprefix("motion."): file.get_tensor(name) for name in names})
