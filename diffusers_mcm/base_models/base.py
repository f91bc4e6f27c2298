"""What the package needs to know about a text-to-video model, and nothing more.

Everything particular to one model's networks lives in one file of this folder, a subclass of `BaseModel` with a row in
`BASE_MODELS`; the pipeline that samples it is a file in `pipelines/`. The algorithm's files only ever see this
interface, so a model with another denoiser, another autoencoder or another noise path is those two files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..conditioning import Conditioning
from ..consistency import NoisePath
from ..settings import DEFAULT_STEPS
from .precision import at_least_float32


def component_class(model_index: Mapping[str, Any], name: str) -> str | None:
    """What `model_index.json` calls the class of a component; `None` if that is left out."""
    return (model_index.get(name) or [None, None])[1]


class BaseModel(ABC):
    """A base model's networks: how they encode video and text, how the denoiser is called, how frames are decoded.

    Shapes: latents `(B, C, T, H, W)`, pixels `(B, 3, T, H, W)` in [-1, 1], images `(N, 3, H, W)` in [-1, 1].
    """

    name: str
    default_repository: str
    denoiser_name: str = "unet"  # the component's name in a repository, and the prefix of its LoRA keys
    denoiser_classes: tuple[str, ...]  # what `model_index.json` may call the class of that component
    # Of a model with two denoisers, each for a phase of the path: what they are called, the one that begins first, and
    # the components that they are.
    experts: Mapping[str, str] = {}
    # Components that may lie in repositories of their own, by name: where they are if nothing says otherwise.
    extra_repositories: Mapping[str, str] = {}
    guidance_range: tuple[float, float]  # of the teacher, w ~ U[w_min, w_max]
    guidance_ranges: Mapping[str, tuple[float, float]] = {}  # instead, of each expert that has one of its own
    height: int
    width: int
    num_frames: int
    fps: int = 8
    num_inference_steps: int = DEFAULT_STEPS
    num_solver_steps: int = 50  # of the teacher's grid, in training
    # How frames are taken in training where no one says: by so many a second, or else every so many.
    data_fps: float | None = None
    frame_interval: int = 8  # the authors' code, for WebVid
    negative_prompt: str = ""  # what guidance leads away from, in training too, where no one names anything
    scheduler_class: Any  # the class that samples what is distilled from this model
    scheduler_defaults: Mapping[str, Any] = {}
    # The keys of a scheduler's configuration that belong to the trained network, not to a way of sampling it, and
    # those by which a LoRA's description says how it is sampled.
    noise_schedule_keys: tuple[str, ...]
    described_scheduler_keys: tuple[str, ...]
    student_settings: Mapping[str, float] = {}  # what of a training decides path and sampler of the student: defaults
    frame_decoders: tuple[str, ...] = ("exact",)  # the ways that `decode_frames` knows
    decodes_any_frames: bool = True  # whether a few of a clip's frames can be decoded at a time, to save memory
    vae_dtype: torch.dtype | None = None  # of the autoencoder in training; None for that of the other networks

    # --- what a repository holds -------------------------------------------------------------------------------------
    def scheduler_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """The repository's scheduler configuration, completed (never overruled) by this model's defaults."""
        return {**self.scheduler_defaults, **(config or {})}

    @abstractmethod
    def noise_path(self, scheduler_config: Mapping[str, Any] | None = None, **student: float) -> NoisePath:
        """x_t as a function of x_0, noise and t, as the repository's scheduler configuration defines it.

        `student` are `student_settings`: `timestep_scaling` and `sigma_data` of eq. 1 for a path that has boundary
        scalings, the `shift` of the grid for one that has none.
        """

    @abstractmethod
    def student_scheduler(
        self, config: Mapping[str, Any], *, num_solver_steps: int, **student: float
    ) -> SchedulerMixin:
        """The sampler that fits a training: the teacher's noise schedule, the student's grid and settings."""

    def few_step_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The sampler on the noise schedule that the network was trained with: this one, or one in its place."""
        if isinstance(scheduler, self.scheduler_class):
            return scheduler
        keys = self.noise_schedule_keys
        config = self.scheduler_config({k: v for k in keys if (v := scheduler.config.get(k)) is not None})
        return self.scheduler_class.from_config({key: config[key] for key in keys if key in config})

    def components_elsewhere(self, model_index: Mapping[str, Any]) -> dict[str, str]:
        """Where the components are by default that a repository with this `model_index.json` leaves out."""
        places = self.extra_repositories.items()
        return {name: place for name, place in places if component_class(model_index, name) is None}

    def matches(self, model_index: Mapping[str, Any]) -> bool:
        """Whether a repository with this `model_index.json` holds this model."""
        return component_class(model_index, self.denoiser_name) in self.denoiser_classes

    def check_repository(self, model_index: Mapping[str, Any]) -> None:  # noqa: B027, as a rule there is nothing
        """`ValueError` if a repository that `matches` is one of a kind that cannot be sampled."""

    @abstractmethod
    def recognises(self, module_names: Iterable[str]) -> bool:
        """Whether LoRA keys with these module names belong to this architecture."""

    def repository_for(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Where the model of that size is that a LoRA was made for, by module and shape of its matrix A.

        `None` if this model comes in other sizes only.
        """
        return self.default_repository

    @abstractmethod
    def lora_target_modules(self, denoiser: nn.Module) -> list[str]:
        """Full names of the modules that get a LoRA, sorted."""

    def is_temporal(self, module: str) -> bool:
        """Whether the module of this full name relates frames to each other; any other sees each frame by itself.

        `ValueError` for a model whose modules do both.
        """
        raise ValueError(
            f"The modules of a {self.name} see space and time at once, so none of them can be trained as spatial or as"
            " temporal ones: train all of them (--lora_modules all)."
        )

    def prepare_denoiser(self, denoiser: nn.Module) -> None:
        """Change a pipeline's denoiser as it must be before anything wraps its modules, such as an offload."""
        return None

    def enable_gradient_checkpointing(self, denoiser: nn.Module) -> None:
        """Recompute activations of the denoiser in the backward pass instead of keeping them."""
        denoiser.enable_gradient_checkpointing()

    def enable_decoder_checkpointing(self, vae: nn.Module) -> None:  # noqa: B027, it saves memory and no more
        """The same for what `decode_frames` computes with; a base model that has no way to do it keeps them."""

    def check_components(self, denoiser: nn.Module, vae: nn.Module) -> None:  # noqa: B027, as a rule there is nothing
        """`ValueError` if the denoiser is one that is not sampled from noise and text alone."""

    def guidance_range_of(self, expert: str | None) -> tuple[float, float]:
        """The ends of w for the teacher's step, where no one says: of a model with experts those of this one."""
        return self.guidance_ranges.get(expert or "", self.guidance_range)

    def sampling_default(self, name: str, denoiser: nn.Module, vae: nn.Module) -> int:
        """The model's own `num_frames`, `height`, `width`, `fps` or `num_inference_steps`."""
        return getattr(self, name)

    # --- the tensors -------------------------------------------------------------------------------------------------
    @abstractmethod
    def latent_shape(self, denoiser: nn.Module, vae: nn.Module, num_frames: int, height: int, width: int) -> tuple:
        """`(C, T, H, W)` of the latents of a clip, whose T may be fewer than its frames; `ValueError` for a size that
        has none."""

    @abstractmethod
    def encode_posterior(self, vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels to the mean and the deviation of the VAE's posterior, of the latents' shape, in the VAE's own scale
        and in the type that it computes them in: all that is worth keeping of a clip."""

    def drop_encoder(self, vae: nn.Module) -> None:
        """Free what only `encode_posterior` computes with: all else goes on as before."""
        for name in ("encoder", "quant_conv"):
            if hasattr(vae, name):
                setattr(vae, name, None)

    @abstractmethod
    def scale_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Latents in the VAE's own scale to those that the denoiser sees."""

    def sample_posterior(
        self, vae: nn.Module, mean: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `encode_posterior` gives to scaled latents, float32 or wider: a sample with `noise` (latents' shape),
        or the mode without. Of the VAE only its configuration is used."""
        latents = at_least_float32(mean)
        if noise is not None:
            latents = latents + at_least_float32(deviation) * noise.to(latents.dtype)
        return self.scale_latents(vae, latents)

    def encode_video(self, vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels to scaled latents, a sample of the posterior with `noise` (latents' shape), or its mode without."""
        return self.sample_posterior(vae, *self.encode_posterior(vae, pixels), noise)

    @abstractmethod
    def decode_video(self, vae: nn.Module, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """Scaled latents to pixels, at most `chunk_size` frames at a time."""

    @abstractmethod
    def decode_frames(
        self, vae: nn.Module, latents: torch.Tensor, frame_indices: torch.Tensor, decoder: str = "exact"
    ) -> torch.Tensor:
        """The clip's frames `frame_indices (B, l)`, counted as in `decode_video`, as `(B * l, 3, H, W)`, sample by
        sample; differentiable. `decoder` is one of `frame_decoders`."""

    @abstractmethod
    def encode_text(self, tokenizer, text_encoder: nn.Module, prompts: list[str]) -> Conditioning:
        """The condition of the denoiser for each prompt; no gradients."""

    def embeds_condition(self, prompt_embeds: torch.Tensor) -> Conditioning:
        """Make the condition of `prompt_embeds` alone, where a caller or a callback brings its own."""
        return {"prompt_embeds": prompt_embeds}

    def text_features(self, denoiser: nn.Module) -> int | None:
        """The last dimension of the `prompt_embeds` that the denoiser reads, where that is known."""
        return None

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning
    ) -> torch.Tensor:
        """The network's output (of the latents' shape) at `timesteps (B,)`, those of the noise path.

        A half-precision network is given float32 latents, and its output is float32: what is rounded of either comes
        back tens of times as large in x̂_0 near the last timestep.
        """
