"""Text to video in a few steps, the same for every base model."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import nn

from .. import hub
from ..lora import LoRA
from . import loading
from .adapters import LoRAVerbs, _as_lora, _free_name
from .networks import require_unmerged
from .publishing import HubVerbs

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


@dataclass
class MCMPipelineOutput(BaseOutput):
    """
    Output of [`MCMPipeline`].

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            The videos: `(B, T, H, W, 3)` in [0, 1] for `np`, `(B, T, 3, H, W)` in [0, 1] for `pt`, a list of frames
            each for `pil`, scaled latents `(B, C, T, H, W)` for `latent`.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]


class MCMPipeline(HubVerbs, LoRAVerbs, DiffusionPipeline):
    """
    Few-step text to video with a motion consistency model. `from_pretrained` returns the subclass for the base model.

    A subclass names its components in `__init__` (their names are a file format) and its `base_model`.

    Arguments of a call:
        prompt (`str` or `list[str]`, *optional*):
            What to show. Either this or `prompt_embeds`.
        height, width, num_frames (`int`, *optional*):
            The size of the videos. Default to what the LoRA was trained on, or else the base model.
        num_inference_steps (`int`, *optional*):
            1 to 8 as a rule. Defaults to the LoRA's recommendation, or else 4.
        guidance_scale (`float`, defaults to 1):
            Above 1, classifier-free guidance, at twice the cost: a motion consistency model has it built in.
        negative_prompt (`str` or `list[str]`, *optional*):
            What to avoid. Only with `guidance_scale > 1`.
        num_videos_per_prompt (`int`, defaults to 1):
            The videos of one prompt follow each other in the output.
        generator (`torch.Generator` or a list of them, *optional*):
            One for all videos or one for each.
        latents (`torch.Tensor`, *optional*):
            The noise to start from, `(B, C, T, H, W)`.
        prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*):
            Encoded prompts, `(B, length, features)`.
        timesteps (`list[int]`, *optional*):
            Descending timesteps to visit, instead of `num_inference_steps`.
        output_type (`str`, defaults to `"np"`):
            `"np"`, `"pt"`, `"pil"` or `"latent"`.
        return_dict (`bool`, defaults to `True`):
            Whether to return an [`MCMPipelineOutput`] or a tuple.
        callback_on_step_end (`Callable`, *optional*):
            Called as `callback(pipeline, step, timestep, tensors)` after each step; may return changed tensors.
        callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
            Which of `latents`, `prompt_embeds`, `negative_prompt_embeds` the callback gets.
        decode_chunk_size (`int`, *optional*, defaults to 16):
            How many frames the VAE decodes at a time; `None` for all at once.
        lora_scale (`float`, *optional*):
            Strength of the active LoRAs during this call, times their weights.
        cross_attention_kwargs (`dict`, *optional*):
            `{"scale": s}` is another way to give `lora_scale`.
    """

    base_model: Any  # a `BaseModel`
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def _set_up(self, sampling: dict[str, Any], **components) -> None:
        """What `__init__` of a subclass does, once the components have their names."""
        self.base_model.check_components(components[self.base_model.denoiser_name], components["vae"])
        require_unmerged([module for module in components.values() if isinstance(module, nn.Module)])
        self.register_modules(**components)
        self.register_to_config(**sampling)
        # Sampling needs no gradients of the base, and torch's choice of a matmul, hence the last bit of a video,
        # depends on whether a weight asks for them. A LoRA in training is left alone.
        for module in components.values():
            if isinstance(module, nn.Module):
                for name, parameter in module.named_parameters():
                    if ".lora_" not in name:
                        parameter.requires_grad_(False)
        self.video_processor = VideoProcessor(do_resize=False)
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    # --- loading and saving ------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        lora: str | os.PathLike | None = None,
        adapter_name: str = "mcm",
        subfolder: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
        base_model: str | os.PathLike | None = None,
        base_model_revision: str | None = None,
        **kwargs,
    ) -> MCMPipeline:
        """
        Load a pipeline that is ready to sample: base model, LoRA, few-step scheduler, no guidance, four steps.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                One of the following, as a local path, a packaged model (`"mcm-shapes"`) or a Hub id:

                    - an MCM LoRA, as a folder or a `.safetensors` file;
                    - a text-to-video model to be sampled in few steps, with the LoRA given as `lora`; for AnimateDiff
                      a Stable Diffusion 1.5 will do, also as a single-file checkpoint (`.safetensors`);
                    - a pipeline saved with [`~MCMPipeline.save_pretrained`].
            lora (`str` or `os.PathLike`, *optional*):
                An MCM LoRA to put in a text-to-video model.
            adapter_name (`str`, defaults to `"mcm"`):
                What the LoRA verbs will call it.
            subfolder (`str`, *optional*), weight_name (`str`, *optional*):
                Where in its folder or repository the LoRA is; of `lora`, where that is given.
            revision (`str`, *optional*):
                Of `pretrained_model_name_or_path`, on the Hub.
            base_model (`str` or `os.PathLike`, *optional*), base_model_revision (`str`, *optional*):
                The base model to put the LoRA in, instead of the one that its configuration names. For AnimateDiff a
                Stable Diffusion 1.5 repository or single-file checkpoint will do, or any fine-tune of it.
            motion_adapter (`str`, `os.PathLike` or `MotionAdapter`, *optional*):
                AnimateDiff's motion modules, instead of those that the LoRA's configuration or the base model names;
                a folder, a repository, or a `.safetensors` file in diffusers' or AnimateDiff's own layout.
            config (`str`, *optional*):
                For a single-file checkpoint: the Stable Diffusion 1.5 whose configurations and tokenizer go with it.
                Defaults to the base model that the LoRA names, or else the usual one.
            variant (`str`, *optional*):
                Which files of the base model's weights to read, as `"fp16"`; their values are turned into `dtype`.
            dtype (`torch.dtype`, defaults to `torch.float32`):
                The type of all weights.
            kwargs:
                `token`, `cache_dir`, `local_files_only`, `force_download`; and for the base model
                `device_map`, components by name, and whatever else diffusers takes.
        """
        dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = dtype or torch_dtype or torch.float32
        options = {key: kwargs[key] for key in loading.HUB_OPTIONS if key in kwargs}
        source = hub.resolve(pretrained_model_name_or_path)
        lora_options = dict(options, subfolder=subfolder, weight_name=weight_name)
        if lora is not None:
            subfolder = None
        index = loading.read_model_index(source, subfolder=subfolder, revision=revision, **options)
        if index is not None:
            if subfolder:
                source = _local_subfolder(source, subfolder)
            pipeline = cls._load_pipeline(source, revision, options, kwargs)
            if lora is not None:
                pipeline.load_mcm_lora(lora, adapter_name=adapter_name, **lora_options)
            return pipeline
        if lora is not None:
            raise ValueError(f"`lora` goes with a base model, but {source} is itself a LoRA.")
        where = dict(lora_options, revision=revision)
        read = _as_lora(source, where)
        base, base_revision = cls._base_for(read, base_model, base_model_revision)
        pipeline = cls._load_pipeline(base, base_revision, options, kwargs, lora=read)
        pipeline.load_mcm_lora(read, adapter_name=adapter_name)
        return pipeline

    @classmethod
    def _base_for(cls, lora: LoRA, repository: str | None, revision: str | None) -> tuple[str, str | None]:
        """Where the base model of a LoRA is."""
        from ..base_models import get_base_model, infer_base_model

        name = lora.config.get("base_model")
        base_model = get_base_model(name) if name else infer_base_model(lora_modules=lora.modules)
        if repository is not None:
            return hub.resolve(repository), revision
        recorded = lora.base_repository or base_model.default_repository
        try:
            return hub.resolve_recorded(recorded, lora.folder), revision or lora.config.get("base_model_revision")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Say where it is with `base_model=`.") from error

    @classmethod
    def _load_pipeline(
        cls, source: str, revision: str | None, options: dict, kwargs: dict, lora: LoRA | None = None
    ) -> MCMPipeline:
        """A base model for `lora`, or one with the adapters it was saved with, as a pipeline of the right subclass."""
        from ..base_models import infer_base_model

        index = loading.read_base_index(source, revision=revision, **options)
        if index is None:
            raise ValueError(f"{source} is not a text-to-video model: it has no model_index.json.")
        pipeline_class = infer_base_model(model_index=index).pipeline_class
        if not issubclass(pipeline_class, cls):
            raise ValueError(f"{source} makes a {pipeline_class.__name__}, not a {cls.__name__}; use MCMPipeline.")
        if loading.is_saved_mcm_pipeline(index):
            source, revision = loading.fetched(source, revision, **options), None
        recorded = {} if lora is None else loading.recorded_repositories(lora, kwargs)
        if os.path.isfile(source) and lora is not None and kwargs.get("config") is None:
            kwargs["config"] = loading.checkpoint_config(lora, **options)
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors=False` was given, but pickled weights are not read.")
        with hub.never_pickled(source, revision=revision, **options):
            pipeline = pipeline_class._load_components(source, index, recorded, revision=revision, **kwargs)
        pipeline.scheduler = loading.few_step_scheduler(pipeline.base_model, pipeline.scheduler)
        if lora is None and loading.is_saved_mcm_pipeline(index):
            pipeline._load_adapters(source, revision=revision, **options)
        return pipeline

    @classmethod
    def _load_components(
        cls, source: str, index: Mapping[str, Any], recorded: Mapping[str, str], **options
    ) -> MCMPipeline:
        """diffusers' own `from_pretrained`; a base model that lies in several repositories adds the others here.

        `index` is `model_index.json`, `recorded` says where the other parts were when the LoRA was trained.
        """
        return super().from_pretrained(source, **options)

    def load_mcm_lora(
        self,
        pretrained_model_name_or_path: str | os.PathLike | LoRA,
        adapter_name: str | None = None,
        **options,
    ) -> None:
        """Load an MCM LoRA, make it the only active adapter, and sample as it was trained to be sampled.

        `options` are those of [`~MCMPipeline.load_lora_weights`].
        """
        lora = _as_lora(pretrained_model_name_or_path, options)
        adapter_name = adapter_name or _free_name("mcm", self._loaded)
        self.load_lora_weights(lora, adapter_name)
        self.set_adapters(adapter_name)
        self.enable_lora()
        if lora.scheduler_config is not None:
            self.scheduler = self.base_model.scheduler_class.from_config(lora.scheduler_config)
        else:
            self.scheduler = loading.few_step_scheduler(self.base_model, self.scheduler)
        sampling = lora.config.get("sampling") or {}
        self.register_to_config(**{key: sampling[key] for key in loading.SAMPLING_KEYS if sampling.get(key)})

    # --- properties --------------------------------------------------------------------------------------------------
    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.base_model.denoiser_name)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def sampling_default(self, name: str) -> int:
        """`num_frames`, `height`, `width`, `fps` or `num_inference_steps`, when the caller leaves it open."""
        return self.config.get(name) or self.base_model.sampling_default(name, self.denoiser, self.vae)

    # --- sampling ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[MCMPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = 16,
        lora_scale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> MCMPipelineOutput | tuple:
        """Make videos. See [`MCMPipeline`] for the arguments; only `prompt` (or `prompt_embeds`) is needed.

        Returns:
            [`MCMPipelineOutput`] or, without `return_dict`, a `tuple` whose first element is the videos.
        """
        num_frames = self.sampling_default("num_frames") if num_frames is None else num_frames
        height = self.sampling_default("height") if height is None else height
        width = self.sampling_default("width") if width is None else width
        shape = self.base_model.latent_shape(self.denoiser, self.vae, num_frames, height, width)
        lora_scale = _lora_scale(lora_scale, cross_attention_kwargs)
        self._check_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, num_videos_per_prompt,
            output_type, callback_on_step_end_tensor_inputs, decode_chunk_size,
        )  # fmt: skip
        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        timesteps = self._set_timesteps(num_inference_steps, timesteps, device)
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs) if callback_on_step_end else None
        with self._lora_scaled(lora_scale):
            size = (num_videos_per_prompt, num_frames, device)
            text, negative = self._encode(prompt, prompt_embeds, *size), None
            batch_size = len(text["prompt_embeds"])
            if self.do_classifier_free_guidance:
                if negative_prompt is None or isinstance(negative_prompt, str):
                    negative_prompt = [negative_prompt or ""] * (batch_size // num_videos_per_prompt)
                negative = self._encode(negative_prompt, negative_prompt_embeds, *size)
                _check_same_shape(text["prompt_embeds"], negative["prompt_embeds"])
            self._add_conditions(text, negative, device)
            latents = self._start_latents((batch_size, *shape), generator, latents, device)
            latents = self._sample(latents, timesteps, text, negative, generator, callback)

        frames = latents
        if output_type != "latent":
            video = self.base_model.decode_video(self.vae, latents, decode_chunk_size)
            frames = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return MCMPipelineOutput(frames=frames) if return_dict else (frames,)

    def _sample(self, latents, timesteps, text, negative, generator, callback) -> torch.Tensor:
        """From noise to a clean sample."""
        options = self._step_options(generator)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                output = self._predict(latents, t, text, negative)
                latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[0]
                if callback is not None:
                    latents = self._call_back(*callback, i, t, latents, text, negative)
                progress_bar.update()
        return latents

    def _step_options(self, generator) -> dict[str, Any]:
        """What the scheduler's step takes; deterministic ones take no generator."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def _call_back(self, function, names, i, t, latents, text, negative) -> torch.Tensor:
        """Show the callback the tensors it asked for, and go on with those it returns."""
        tensors = {"latents": latents, "prompt_embeds": text["prompt_embeds"]}
        tensors["negative_prompt_embeds"] = None if negative is None else negative["prompt_embeds"]
        tensors.update(function(self, i, t, {name: tensors[name] for name in names}) or {})
        text["prompt_embeds"] = tensors["prompt_embeds"]
        if negative is not None:
            negative["prompt_embeds"] = tensors["negative_prompt_embeds"]
        return tensors["latents"]

    def _predict(self, latents, t, text, negative) -> torch.Tensor:
        """The network's output, guided if there is a `negative` text; one call either way."""
        if negative is None:
            return self._denoise(self.scheduler.scale_model_input(latents, t), t, text)
        latents = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
        both = {key: torch.cat([negative[key], text[key]]) for key in text}
        without, given = self._denoise(latents, t, both).chunk(2)
        return without + self._guidance_scale * (given - without)

    def _denoise(self, latents, t, text) -> torch.Tensor:
        return self.base_model.denoise(self.denoiser, latents, t.expand(len(latents)), text)

    def _encode(
        self, prompt, prompt_embeds, num_videos_per_prompt: int, num_frames: int, device
    ) -> dict[str, torch.Tensor]:
        """The condition for every video: prompts, each repeated `num_videos_per_prompt` times."""
        if prompt_embeds is not None:
            text = {"prompt_embeds": prompt_embeds}
        else:
            text = self._encode_prompts([prompt] if isinstance(prompt, str) else prompt, num_frames)
        text = {key: value.to(device).repeat_interleave(num_videos_per_prompt, 0) for key, value in text.items()}
        return text | {"prompt_embeds": text["prompt_embeds"].to(self.denoiser.dtype)}

    def _encode_prompts(self, prompts: Sequence[str], num_frames: int) -> dict[str, torch.Tensor]:
        return self.base_model.encode_text(self.tokenizer, self.text_encoder, list(prompts))

    def _add_conditions(self, text: dict, negative: dict | None, device) -> None:
        """Add to the texts what else a base model's network is conditioned on."""

    def _set_timesteps(self, num_inference_steps, timesteps, device) -> torch.Tensor:
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(self.scheduler).__name__} takes no `timesteps`.")
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            steps = (
                self.sampling_default("num_inference_steps") if num_inference_steps is None else num_inference_steps
            )
            _check_positive("num_inference_steps", steps)
            self.scheduler.set_timesteps(steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _start_latents(self, shape, generator, latents, device) -> torch.Tensor:
        if isinstance(generator, (list, tuple)) and len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators were given for {shape[0]} videos; give one, or one for each."
            )
        dtype = self.denoiser.dtype  # once: diffusers walks over all modules to find it
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _check_inputs(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, num_videos_per_prompt,
        output_type, callback_inputs, decode_chunk_size,
    ) -> None:  # fmt: skip
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Give either `prompt` or `prompt_embeds`, and not both.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Give either `negative_prompt` or `negative_prompt_embeds`, not both.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None:
                self._check_prompt(name, value)
        count = len(prompt_embeds) if prompt is None else len(prompt) if isinstance(prompt, (list, tuple)) else 1
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != count:
            raise ValueError(f"{len(negative_prompt)} negative prompts were given for {count} prompts.")
        if guidance_scale <= 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
            logger.warning(
                "The negative prompt has no effect at guidance_scale=%g; it needs a scale above 1.", guidance_scale
            )
        _check_positive("num_videos_per_prompt", num_videos_per_prompt)
        if decode_chunk_size is not None:
            _check_positive("decode_chunk_size", decode_chunk_size)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown output_type {output_type!r}; valid values are {', '.join(OUTPUT_TYPES)}.")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"The callback cannot get {unknown[0]!r}; valid are {', '.join(self._callback_tensor_inputs)}."
            )

    def _check_prompt(self, name: str, value) -> None:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(p, str) for p in value)
        if not isinstance(value, str) and not is_list:
            raise ValueError(f"`{name}` must be a string or a list of at least one string, got {value!r}.")


def _lora_scale(lora_scale: float | None, cross_attention_kwargs: dict[str, Any] | None) -> float:
    """The strength that either of the two arguments gives."""
    options = dict(cross_attention_kwargs or {})
    scale = options.pop("scale", None)
    if options:
        raise ValueError(f"`cross_attention_kwargs` takes only 'scale', got {', '.join(map(repr, options))}.")
    if scale is not None and lora_scale is not None and scale != lora_scale:
        raise ValueError(f"`lora_scale` is {lora_scale}, but `cross_attention_kwargs` says {scale}; give one of them.")
    given = scale if lora_scale is None else lora_scale
    return 1.0 if given is None else float(given)


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def _check_same_shape(text: torch.Tensor, negative: torch.Tensor) -> None:
    if text.shape != negative.shape:
        raise ValueError(
            "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got"
            f" {tuple(text.shape)} and {tuple(negative.shape)}."
        )


def _local_subfolder(source: str, subfolder: str) -> str:
    if not os.path.isdir(source):
        raise ValueError(f"{source}: `subfolder` selects a LoRA; a pipeline on the Hub has to be at the top.")
    return os.path.join(source, subfolder)
