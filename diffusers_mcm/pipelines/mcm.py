"""Text to video in a few steps, the same for every base model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import nn

from ..base_models import BaseModel, infer_base_model
from ..location import HUB_OPTIONS, Location, check_whole, refuse_pickled
from ..lora import LoRA, LoRAPair, find_pair, read_loras
from ..settings import SAMPLING_KEYS
from . import checks, loading
from .callbacks import TENSORS, step_callback
from .fusing import require_unfused
from .motion_models import MotionModel, find_motion_model
from .publishing import HubVerbs
from .request import arguments
from .sampling import Sampling
from .sole_use import alone, one_call

logger = logging.getLogger(__name__)


@dataclass
class MCMPipelineOutput(BaseOutput):
    """Output of [`MCMPipeline`].

    Args:
        frames: `(B, T, H, W, 3)` in [0, 1] for `np`, `(B, T, 3, H, W)` in [0, 1] for `pt`, a list of frames for each
            video for `pil`, scaled latents `(B, C, T, H, W)` for `latent`.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]


@alone(
    *("load_mcm_lora", "load_lora_weights", "unload_lora_weights", "delete_adapters", "set_adapters"),
    *("enable_lora", "disable_lora", "fuse_lora", "unfuse_lora"),
    *("save_pretrained", "save_mcm_lora", "push_to_hub"),
    *("to", "reset_device_map", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    *("remove_all_hooks", "maybe_free_model_hooks", "set_attention_slice", "enable_attention_slicing"),
    "encode_prompt",
)
class MCMPipeline(HubVerbs, Sampling, DiffusionPipeline):
    """Few-step text to video with a motion consistency model.

    `from_pretrained` returns the subclass for the base model, which names its components in `__init__` (their names
    are a file format) and its `base_model`.
    """

    base_model: BaseModel
    motion_model: MotionModel | None = None  # what `from_pretrained` was given, where that was motion modules
    _callback_tensor_inputs = list(TENSORS)
    _of_base_models: dict[str, type[MCMPipeline]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "base_model" in vars(cls):  # and not a subclass of such a pipeline, which samples the same model
            cls._of_base_models[cls.base_model.name] = cls

    def _set_up(self, **components) -> None:
        """Do what `__init__` of a subclass has to, with all its arguments: components and what a call defaults to."""
        sampling = {name: components.pop(name) for name in SAMPLING_KEYS}
        networks = [module for module in components.values() if isinstance(module, nn.Module)]
        require_unfused(networks)
        self.register_modules(**components)
        for denoiser in self.denoisers.values():
            self.base_model.check_components(denoiser, components["vae"])
        self.register_to_config(**sampling)
        # Sampling needs no gradients of the base, and torch's choice of a matmul, hence the last bit of a video,
        # depends on whether a weight asks for them. A LoRA in training is left alone.
        for name, parameter in (named for network in networks for named in network.named_parameters()):
            if ".lora_" not in name:
                parameter.requires_grad_(False)
        for denoiser in self.denoisers.values():
            self.base_model.prepare_denoiser(denoiser)
        self.video_processor = VideoProcessor(do_resize=False)
        self._guidance_scale, self._interrupt, self._num_timesteps, self._current_timestep = 1.0, False, 0, None

    # --- loading and saving ------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        lora: str | os.PathLike | LoRAPair | Sequence[str | os.PathLike] | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
        base_model: str | os.PathLike | None = None,
        base_model_revision: str | None = None,
        **kwargs,
    ) -> MCMPipeline:
        """Load a pipeline that is ready to sample: base model, LoRA, few-step scheduler, no guidance, four steps.

        Args:
            pretrained_model_name_or_path: As a local path, a packaged model (`"mcm-shapes"`) or a Hub id:

                    - an MCM LoRA, as a folder or a `.safetensors` file; for Wan 2.2 A14B the pair for its two experts,
                      as a folder with both or as two, `(high_noise, low_noise)`;
                    - a text-to-video model to be sampled in few steps, with the LoRA given as `lora`; for AnimateDiff
                      a Stable Diffusion 1.5 will do, also as a single-file checkpoint (`.safetensors`);
                    - a pipeline saved with [`~MCMPipeline.save_pretrained`];
                    - motion modules for a Stable Diffusion 1.5: AnimateLCM, AnimateDiff-Lightning (of which
                      `num_inference_steps` chooses the file) or plain ones; sampled as their makers say, but for the
                      guidance, which a call is given: 2 for AnimateLCM.
            lora: An MCM LoRA, or a pair, to put in a text-to-video model. Those that a pipeline was saved with stay
                loaded, but do not act: they are unfused, and `set_adapters` brings them back.
            adapter_name: What the LoRA verbs will call it. Defaults to `"mcm"`, or if that is taken `"mcm_1"`.
            subfolder, weight_name: Where in its folder or repository the LoRA is; of `lora`, where that is given.
            revision: Of `pretrained_model_name_or_path`, on the Hub.
            base_model, base_model_revision: What to put the LoRA in, instead of the base model that it names. For
                AnimateDiff a Stable Diffusion 1.5, as a repository or single-file checkpoint, or any fine-tune of it.
            motion_adapter (`str`, `os.PathLike` or `MotionAdapter`, *optional*): AnimateDiff's motion modules, instead
                of those that the LoRA's configuration or the base model names; a folder, a repository, or a
                `.safetensors` file in diffusers' or AnimateDiff's own layout.
            config (`str`, *optional*): For a single-file checkpoint: the Stable Diffusion 1.5 whose configurations and
                tokenizer go with it. Defaults to the base model that the LoRA names, or else the usual one.
            variant (`str`, *optional*): Of the files of the base model's weights, as `"fp16"`; they become `dtype`.
            dtype (`torch.dtype`, defaults to `torch.float32`): The type of all weights.
            kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`; and for the base model `device_map`,
                components by name, and whatever else diffusers takes. What is named here wins over what a LoRA says:
                `num_inference_steps`, `num_frames`, `height`, `width`, `fps` and a few-step `scheduler`.
        """
        kwargs["dtype"] = checks.only_dtype(kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None))
        options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        place: dict[str, Any] = dict(subfolder=subfolder, weight_name=weight_name)
        named: Any = pretrained_model_name_or_path
        base = (base_model, base_model_revision)
        if lora is None and any(isinstance(each, (list, tuple)) for each in (named, subfolder, weight_name)):
            read = read_loras(named, revision=revision, **place, **options)
            return cls._load_with_lora(read, adapter_name, *base, kwargs)
        location = Location.of(named, revision=revision, **options)
        if lora is None:
            location = replace(location, **place)
        index = loading.read_model_index(location)
        if index is not None:
            if location.subfolder:
                if not location.is_folder:
                    why = "`subfolder` selects a LoRA; a pipeline on the Hub has to be at the top."
                    raise ValueError(f"{location.name}: {why}")
                location = replace(location, name=os.path.join(location.name, location.subfolder), subfolder=None)
            pipeline = cls._load_pipeline(location, index, kwargs)
            if lora is not None:
                pipeline._make_way(location)
                pipeline.load_mcm_lora(lora, adapter_name, **place, **options)
                pipeline._sample_as_named(kwargs)
            return pipeline
        pair = find_pair(location) if lora is None else None
        motion = None if pair else find_motion_model(location, kwargs.get("num_inference_steps"))
        if pair is None:
            loading.check_alone(location, lora, is_lora=motion is None)
        if motion is not None:
            return cls._load_with_motion(motion, *base, kwargs)
        return cls._load_with_lora(read_loras(location), adapter_name, *base, kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> MCMPipeline:
        """Make a pipeline of another, with its components, as diffusers does.

        LoRAs that lie on the networks are loaded in both; the new pipeline also samples as the last of them says.
        """
        made = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, MCMPipeline) and made.denoiser is pipeline.denoiser:
            made._brought, made.motion_model = pipeline._brought, pipeline.motion_model
        return made

    @classmethod
    def _load_with_lora(
        cls,
        read: LoRA | LoRAPair,
        adapter_name: str | None,
        base_model: str | os.PathLike | None,
        revision: str | None,
        kwargs: dict[str, Any],
    ) -> MCMPipeline:
        """The base model of a LoRA, or another that is named, with it."""
        options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        first = read if isinstance(read, LoRA) else read[0]
        base = loading.base_location(first, base_model, options)
        base = replace(base, revision=revision or base.revision)
        pipeline = cls._load_pipeline(base, loading.read_base_index(base), kwargs, first)
        pipeline.load_mcm_lora(read, adapter_name)
        pipeline._sample_as_named(kwargs)
        return pipeline

    @classmethod
    def _load_pipeline(
        cls, location: Location, index: Mapping[str, Any], kwargs: dict[str, Any], lora: LoRA | None = None
    ) -> MCMPipeline:
        """A base model for `lora`, or one with the adapters it was saved with, as a pipeline of the right subclass.

        `index` is its `model_index.json`.
        """
        pipeline_class = cls._of_base_models[infer_base_model(model_index=index).name]
        if not issubclass(pipeline_class, cls):
            raise ValueError(
                f"{location.name} makes a {pipeline_class.__name__}, not a {cls.__name__}; use MCMPipeline."
            )
        saved = str(index.get("_class_name")).endswith("MCMPipeline")
        repository = location.name
        if saved:  # diffusers fetches no components of other classes
            location = location.fetched()
        elsewhere = pipeline_class.base_model.components_elsewhere(index)
        recorded = {} if lora is None else loading.recorded_repositories(lora, kwargs)
        elsewhere = {name: recorded.get(name, place) for name, place in elsewhere.items()}
        if location.is_file and lora is not None and kwargs.get("config") is None:
            kwargs["config"] = loading.checkpoint_config(lora, location.options)
        refuse_pickled(kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        with location.never_pickled():
            pipeline = pipeline_class._load_components(location, index, elsewhere, **kwargs)
        if saved:  # what LoRAs record as their base model: not the folder in the cache
            pipeline.register_to_config(_name_or_path=repository)
        if kwargs.get("device_map") is None:  # which leaves weights elsewhere
            for name in pipeline.components.keys() - kwargs.keys():
                check_whole(pipeline.components[name], f"{name} of {location.name}")
        pipeline.scheduler = pipeline.few_step_scheduler()
        if lora is None and saved:
            pipeline._load_adapters(location)
        return pipeline

    @classmethod
    def _load_with_motion(
        cls, motion: MotionModel, base_model: str | os.PathLike | None, revision: str | None, kwargs: dict[str, Any]
    ) -> MCMPipeline:
        """A base model with motion modules, and sampled as those are."""
        options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        base = Location.of(base_model or motion.default_base, revision=revision, **options)
        index = loading.read_base_index(base)
        pipeline = cls._load_pipeline(base, index, kwargs | motion.components(base, index, kwargs))
        motion.set_up(pipeline)
        pipeline._sample_as_named(kwargs)
        pipeline.motion_model = motion
        return pipeline

    @classmethod
    def _load_components(
        cls, location: Location, index: Mapping[str, Any], elsewhere: Mapping[str, str], **options
    ) -> MCMPipeline:
        """diffusers' own `from_pretrained`; a base model that lies in several repositories adds the others here.

        `index` is `model_index.json`, `elsewhere` says where the components are that it leaves out.
        """
        return super().from_pretrained(location.name, revision=location.revision, **options)

    def few_step_scheduler(self) -> SchedulerMixin:
        """The pipeline's scheduler, or one in its place that samples in few steps, for a network without a LoRA."""
        return self.base_model.few_step_scheduler(self.scheduler)

    # --- properties --------------------------------------------------------------------------------------------------
    @property
    def denoiser(self) -> nn.Module:
        """The network that denoises, or of two experts the one that begins."""
        return next(iter(self.denoisers.values()))

    guidance_scale = property(attrgetter("_guidance_scale"))
    num_timesteps = property(attrgetter("_num_timesteps"))
    interrupt = property(attrgetter("_interrupt"))
    current_timestep = property(attrgetter("_current_timestep"))  # while sampling, for diffusers' caches; else `None`

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def sampling_default(self, name: str) -> int:
        """`num_frames`, `height`, `width`, `fps` or `num_inference_steps`, when the caller leaves it open."""
        return self.config.get(name) or self.base_model.sampling_default(name, self.denoiser, self.vae)

    # --- sampling ----------------------------------------------------------------------------------------------------
    @one_call
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
        timesteps: Sequence[float] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[MCMPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = 16,
        lora_scale: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> MCMPipelineOutput | tuple:
        """Make videos.

        Args:
            prompt: What to show. Either this or `prompt_embeds`.
            height, width, num_frames: By default what the LoRA was trained on, or else the base model's.
            num_inference_steps: 1 to 8 as a rule. Defaults to the LoRA's recommendation, or else 4.
            guidance_scale: Above 1, classifier-free guidance, at twice the cost; a consistency model has it built in.
            negative_prompt: What to avoid. Only with `guidance_scale > 1`; defaults to the base model's own: for Wan
                the text that its authors use, for the others the empty one.
            num_videos_per_prompt: The videos of one prompt follow each other in the output.
            generator: One for all videos or one for each.
            latents: The noise to start from, `(B, C, T, H, W)`.
            prompt_embeds, negative_prompt_embeds: What `encode_prompt` makes of prompts, `(B, length, features)`.
            timesteps: Descending timesteps to visit, instead of `num_inference_steps`.
            output_type: `"np"`, `"pt"`, `"pil"` or `"latent"`; defaults to `"np"`, for AnimateDiff to `"pil"`.
            return_dict: Whether to return an [`MCMPipelineOutput`] or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after each step; may return
                changed tensors, and use the LoRA verbs for the steps to come. diffusers' own callbacks work.
            callback_on_step_end_tensor_inputs: Which of `latents`, `prompt_embeds`, `negative_prompt_embeds` it gets.
                Under guidance `prompt_embeds` are, as in diffusers, the negative ones and then the others.
            decode_chunk_size: How many frames the VAE decodes at a time; `None` for all at once. Wan's decodes one
                latent after the other in any case; `pipe.vae.enable_tiling()` saves memory there.
            lora_scale: Strength of the active LoRAs during this call, times their weights.
            cross_attention_kwargs: `{"scale": s}` is another way to give `lora_scale`.

        Returns:
            [`MCMPipelineOutput`] or, without `return_dict`, a `tuple` whose first element is the videos.

        Raises:
            `ValueError`: for an argument that is wrong, before anything is sampled, and for values that are not finite
                in what was sampled. `RuntimeError`: while the pipeline, or what it shares, is at another call.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers_mcm import MCMPipeline
            >>> from diffusers_mcm.video_io import write_video

            >>> pipe = MCMPipeline.from_pretrained("mcm-shapes")  # is in the package; no download
            >>> generator = torch.Generator().manual_seed(0)
            >>> video = pipe("a red circle moving left on a black background", generator=generator).frames[0]
            >>> video.shape
            (16, 64, 64, 3)
            >>> write_video("circle.mp4", video, fps=8)
            ```
        """
        return self._make_videos(**arguments(locals()))

    def _make_videos(self, return_dict: bool, **asked) -> MCMPipelineOutput | tuple:
        """Make the frames that a call is asked for, once all its arguments are checked."""
        request = self._request(**asked)
        self._check(request)
        callback = step_callback(self, request.callback_on_step_end, request.callback_on_step_end_tensor_inputs)
        size = (request.num_frames, request.height, request.width)
        videos = request.count_prompts() * request.num_videos_per_prompt
        if not request.guided and not (request.negative_prompt is None and request.negative_prompt_embeds is None):
            why = "The negative prompt has no effect at guidance_scale=%g; it needs a scale above 1."
            logger.warning(why, request.guidance_scale)
        device, dtype = self._execution_device, self.denoiser.dtype
        request.generator = checks.generators(request.generator, videos, device)
        channels, *_ = latent_shape = self.base_model.latent_shape(self.denoiser, self.vae, *size)
        if request.latents is not None:
            self._check_latents(request.latents, (videos, *latent_shape))
        self._guidance_scale, self._interrupt = request.guidance_scale, False

        timesteps = self._set_timesteps(request, device)
        with self._lora_scaled(request.lora_scale):
            text, negative = self._encode_texts(request, request.guided, device)
            self._add_conditions(request, text, negative, device)
            latents = self.prepare_latents(videos, channels, *size, dtype, device, request.generator, request.latents)
            latents = self._sample(latents, timesteps, text, negative, request, callback)
        checks.check_sampled(latents, self.denoiser)
        frames = latents.to(dtype)
        if request.output_type != "latent":
            video = self.decode_latents(latents, request.decode_chunk_size)
            frames = self.video_processor.postprocess_video(video, output_type=request.output_type)
        self.maybe_free_model_hooks()
        return MCMPipelineOutput(frames=frames) if return_dict else (frames,)
