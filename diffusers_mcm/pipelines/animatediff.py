"""Text to video with AnimateDiff."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    MotionAdapter,
    SchedulerMixin,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.image_processor import PipelineImageInput
from diffusers.models.attention import FreeNoiseTransformerBlock
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..base_models.animatediff import (
    ADAPTER,
    IMAGE_EMBEDS,
    AnimateDiff,
    has_adapter,
    has_motion,
    is_animatediff,
    with_motion,
)
from ..base_models.motion_adapter import load_motion_adapter
from ..location import HUB_OPTIONS, Location
from ..lora import lora_layers
from ..scheduler import MCMScheduler
from . import checks
from .mcm import MCMPipeline
from .single_file import load_checkpoint
from .sole_use import alone, sole_use

logger = logging.getLogger(__name__)

_OF_FOLDERS = ("variant", "use_safetensors", "revision")  # a checkpoint in one file has none of them


@alone(
    *("enable_free_noise", "disable_free_noise", "enable_free_noise_split_inference", "enable_free_init"),
    *("disable_free_init", "enable_freeu", "disable_freeu", "fuse_qkv_projections", "unfuse_qkv_projections"),
    *("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"),
    *("load_textual_inversion", "unload_textual_inversion"),
)
class AnimateDiffMCMPipeline(MCMPipeline, AnimateDiffPipeline):
    """
    Few-step text to video with AnimateDiff.

    Args:
        vae ([`AutoencoderKL`]): Encodes and decodes single frames.
        text_encoder ([`CLIPTextModel`]), tokenizer ([`CLIPTokenizer`]): Encode the prompt.
        unet ([`UNetMotionModel`] or [`UNet2DConditionModel`]): The denoiser, or the one to put motion modules in.
        scheduler ([`MCMScheduler`]): Any scheduler of diffusers works too, for comparison.
        motion_adapter ([`MotionAdapter`], *optional*): Motion modules. Copied into the UNet, and not kept.
        feature_extractor, image_encoder (*optional*): Encode the pictures for an IP-Adapter.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model = AnimateDiff()

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel | UNetMotionModel,
        scheduler: SchedulerMixin,
        motion_adapter: MotionAdapter | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: float | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=with_motion(unet, motion_adapter),
            motion_adapter=None,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        sampling = dict(
            height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, fps=fps
        )
        self._set_up(sampling, vae=vae, text_encoder=text_encoder, unet=self.unet, image_encoder=image_encoder)
        betas = self.scheduler.config.get("beta_schedule")
        if isinstance(unet, UNet2DConditionModel) and betas != "linear":
            logger.warning(
                "The scheduler has the %s betas of an image model; the motion modules were trained on linear ones:"
                ' pipe.scheduler = MCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear").',
                betas,
            )

    @classmethod
    def _load_components(cls, location: Location, index: Mapping[str, Any], recorded: Mapping[str, str], **options):
        where = location.options
        if location.is_file:
            return cls._of_checkpoint(location.name, recorded, where, **options)
        complete = isinstance(options.get("unet"), UNetMotionModel) or has_motion(index)
        adapter = options.pop(ADAPTER, None)
        if adapter is None and not complete and not has_adapter(index):
            adapter = recorded.get(ADAPTER) or cls.base_model.extra_repositories[ADAPTER]
        if not is_animatediff(index) and "scheduler" not in options:
            config = location.inside("scheduler").json("scheduler_config.json")
            config = cls.base_model.own_schedule(index, config)
            options["scheduler"] = MCMScheduler.from_config(cls.base_model.scheduler_config(config))
        if adapter is not None:
            adapter = load_motion_adapter(adapter, options["dtype"], variant=options.get("variant"), **where)
        if adapter is not None or complete:
            options[ADAPTER] = None if complete else adapter  # what is in the repository need not be read
        pipeline = super()._load_components(location, index, recorded, **options)
        if complete and adapter is not None:
            pipeline.unet.load_motion_modules(adapter)
        return pipeline

    @classmethod
    def _of_checkpoint(cls, path, recorded, where, dtype, motion_adapter=None, config=None, **given):
        """A pipeline of a single-file checkpoint, with the components that are `given`."""
        parts = load_checkpoint(path, os.fspath(config or cls.base_model.default_repository), dtype, **where)
        schedule = cls.base_model.own_schedule({}, parts["scheduler"].config)
        parts["scheduler"] = MCMScheduler.from_config(cls.base_model.scheduler_config(schedule))
        adapter = motion_adapter or recorded.get(ADAPTER) or cls.base_model.extra_repositories[ADAPTER]
        given = {key: value for key, value in given.items() if key not in (*HUB_OPTIONS, *_OF_FOLDERS)}
        pipeline = cls(**parts | given, motion_adapter=load_motion_adapter(adapter, dtype, **where))
        pipeline.register_to_config(_name_or_path=path)
        return pipeline

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike, **kwargs):
        """[`~MCMPipeline.from_pretrained`], under the name that diffusers has for a checkpoint in one file."""
        return cls.from_pretrained(pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As diffusers' own; a Stable Diffusion pipeline needs a `motion_adapter` besides.

        Its scheduler stays behind unless one is given: the image model's betas are not those of the motion modules.
        """
        unet = kwargs.get("unet", pipeline.unet)
        if isinstance(unet, UNet2DConditionModel):
            if lora_layers(unet):
                raise ValueError(
                    "A LoRA is loaded in the Stable Diffusion pipeline: `unload_lora_weights()` there first, and load"
                    " it here."
                )
            if "scheduler" not in kwargs:
                config = cls.base_model.own_schedule({}, pipeline.scheduler.config)
                kwargs["scheduler"] = MCMScheduler.from_config(cls.base_model.scheduler_config(config))
        return super().from_pipe(pipeline, **kwargs)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """diffusers' own; a LoRA has to be fused into the projections before, for beside them it would do nothing."""
        if unet and not self.fused_loras:
            layers = [
                name for name, layer in self._layers.items() if name.rpartition(".")[2] in ("to_q", "to_k", "to_v")
            ]
            if layers:
                raise ValueError(
                    "Cannot fuse the attention's projections while a LoRA lies on them"
                    f" ({len(layers)}, such as {layers[0]!r}): `fuse_lora()` first, or unload it."
                )
        super().fuse_qkv_projections(unet, vae)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As [`MCMPipeline.save_pretrained`]; an IP-Adapter, which diffusers cannot load again, has to go before."""
        if self._has_ip_adapter:
            raise ValueError("An IP-Adapter cannot be saved with the pipeline; `unload_ip_adapter()` first.")
        super().save_pretrained(save_directory, *args, **kwargs)

    # --- stock AnimateDiff's own ways to sample ----------------------------------------------------------------------
    def __call__(
        self,
        prompt: str | list[str] | dict[int, str] | None = None,
        *args,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        clip_skip: int | None = None,
        eta: float = 0.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """Make videos. The arguments are those of [`MCMPipeline`], and of diffusers' `AnimateDiffPipeline`:

        Args:
            prompt (`str`, `list[str]` or `dict[int, str]`, *optional*):
                With FreeNoise also a text for each of some frames, the first of them 0; in between they are mixed.
            ip_adapter_image (*optional*), ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                For a loaded IP-Adapter, a picture, or its embedding as diffusers defines it; one entry an adapter.
            clip_skip (`int`, *optional*):
                How many of the last layers of the text encoder to leave out.
            eta (`float`, defaults to 0):
                Of DDIM; other schedulers have none.
            cross_attention_kwargs (`dict`, *optional*):
                `scale` is `lora_scale`; all else (`ip_adapter_masks`) goes to the attention layers.

        Returns:
            [`MCMPipelineOutput`] or, without `return_dict`, a `tuple` whose first element is the videos.
        """
        with sole_use(self, to_call=True):
            self._check_pictures(ip_adapter_image, ip_adapter_image_embeds)
            self._clip_skip = self._checked_clip_skip(clip_skip)
            self._eta = checks.eta(eta)
            scale, others = checks.split_scale(cross_attention_kwargs)
            self._cross_attention_kwargs = others or None
            self._pictures = (ip_adapter_image, ip_adapter_image_embeds)
            try:
                return super().__call__(prompt, *args, cross_attention_kwargs=scale, **kwargs)
            finally:
                self._pictures = (None, None)

    def _check_pictures(self, pictures, embeds) -> None:
        if pictures is not None and embeds is not None:
            raise ValueError("Give either `ip_adapter_image` or `ip_adapter_image_embeds`, not both.")
        given = pictures is not None or embeds is not None
        if given != self._has_ip_adapter:
            raise ValueError(
                "An IP-Adapter and a picture go together: "
                + ("a picture was given, but no IP-Adapter is loaded." if given else "give `ip_adapter_image`.")
            )
        if pictures is not None and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError(
                "`ip_adapter_image` needs an `image_encoder` and a `feature_extractor` in the pipeline; give"
                " `ip_adapter_image_embeds` without."
            )
        if given:
            name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
            checks.check_one_each(name, embeds if pictures is None else pictures, self._ip_adapters)

    def _checked_clip_skip(self, clip_skip) -> int | None:
        if clip_skip is None or self.text_encoder is None:
            return clip_skip
        clip_skip, layers = (
            checks.whole_number("clip_skip", clip_skip, least=0),
            self.text_encoder.config.num_hidden_layers,
        )
        if clip_skip > layers:
            raise ValueError(f"`clip_skip` must be at most {layers}, the layers of the text encoder, got {clip_skip}.")
        return clip_skip

    @property
    def _has_ip_adapter(self) -> bool:
        return self.unet.encoder_hid_proj is not None

    @property
    def _ip_adapters(self) -> int:
        return len(self.unet.encoder_hid_proj.image_projection_layers)

    def enable_free_noise(self, context_length: int | None = 16, *args, **kwargs) -> None:
        """diffusers' own, with the LoRAs that are loaded; a clip of fewer frames than the context has one window."""
        context_length = context_length or self.unet.config.motion_max_seq_length
        self.motion_adapter = self.unet  # which knows the longest clip as well
        try:
            with self._clean_networks():  # new blocks are made from the weights of the old
                super().enable_free_noise(context_length, *args, **kwargs)
        finally:
            self.motion_adapter = None

    def disable_free_noise(self) -> None:
        """diffusers' own, with the LoRAs that are loaded."""
        with self._clean_networks():
            super().disable_free_noise()

    def enable_free_noise_split_inference(self, *args, **kwargs) -> None:
        """diffusers' own; it gives the modules other names, by which those that were fused before are not found."""
        self._require_unfused("split the inference")
        super().enable_free_noise_split_inference(*args, **kwargs)

    def _check_prompt(self, name: str, value) -> None:
        if not isinstance(value, dict):
            return super()._check_prompt(name, value)
        if not self.free_noise_enabled:
            raise ValueError(f"`{name}` may be a dictionary of frames only after `enable_free_noise()`.")
        frames_fit = all(isinstance(frame, int) and frame >= 0 for frame in value) and 0 in value
        if not frames_fit or not all(isinstance(text, str) for text in value.values()):
            raise ValueError(f"`{name}` must name a text for frame 0, and for any later frames, got {value!r}.")

    def _check_embeds(self, name, embeds, num_frames):
        if isinstance(embeds, torch.Tensor) and embeds.ndim == 4:  # a text for each frame
            if embeds.shape[1] != num_frames:
                raise ValueError(f"`{name}` has texts for {embeds.shape[1]} frames of a clip of {num_frames}.")
            embeds = embeds.flatten(0, 1)
        super()._check_embeds(name, embeds, num_frames)

    def _check_latents(self, latents, shape):
        repeated = self.free_noise_enabled and self._free_noise_noise_type == "repeat_context"
        if repeated and getattr(latents, "ndim", 0) == 5 and latents.shape[2] == self._free_noise_context_length:
            shape = (*shape[:2], self._free_noise_context_length, *shape[3:])
        super()._check_latents(latents, shape)

    def _encode(self, prompt, prompt_embeds, num_videos_per_prompt, num_frames, device):
        text = super()._encode(prompt, prompt_embeds, num_videos_per_prompt, num_frames, device)
        embeds = text["prompt_embeds"]
        if self.free_noise_enabled and embeds.ndim == 3:  # one of the two texts may be one per frame
            text["prompt_embeds"] = embeds[:, None].expand(-1, num_frames, -1, -1)
        return text

    def _encode_prompts(self, prompts, num_frames):
        if not isinstance(prompts, dict):
            prompts = self.maybe_convert_prompt(list(prompts), self.tokenizer)  # textual inversion
            return self.base_model.encode_text(self.tokenizer, self.text_encoder, prompts, self._clip_skip or 0)
        if max(prompts) >= num_frames:
            raise ValueError(f"There is a text for frame {max(prompts)} of a clip of {num_frames}, counted from 0.")
        prompts = {frame: prompts[frame] for frame in sorted(prompts)}
        prompts.setdefault(num_frames - 1, prompts[max(prompts)])
        frames = list(prompts)
        embeds = self._encode_prompts(prompts.values(), num_frames)["prompt_embeds"].split(1)
        mixed = embeds[0].expand(num_frames, -1, -1).clone()
        for start, end, first, last in zip(frames, frames[1:], embeds, embeds[1:]):
            mixed[start : end + 1] = self._free_noise_prompt_interpolation_callback(start, end, first, last)
        return {"prompt_embeds": mixed[None]}

    def _add_conditions(self, text, negative, device):
        if not self._has_ip_adapter:
            return
        batch, (pictures, given) = len(text["prompt_embeds"]), self._pictures
        if given is not None:
            checks.check_image_embeds(given, guided=negative is not None)
        found = self.prepare_ip_adapter_image_embeds(pictures, given, device, batch, negative is not None)
        for i, embeds in enumerate(found):
            embeds = embeds.to(self.unet.dtype)
            if negative is not None:
                negative[f"{IMAGE_EMBEDS}{i}"], embeds = embeds.chunk(2)
            text[f"{IMAGE_EMBEDS}{i}"] = embeds

    def _start_latents(self, shape, generator, latents, device):
        if self.free_noise_enabled:
            batch, channels, num_frames, height, width = shape
            size = (channels, num_frames, height * self.vae_scale_factor, width * self.vae_scale_factor)
            one_each = latents is None and isinstance(generator, (list, tuple))
            latents = torch.cat(
                [
                    self._prepare_latents_free_noise(count, *size, self._latents_dtype, device, each, latents)
                    for count, each in ([(1, each) for each in generator] if one_each else [(batch, generator)])
                ]
            )
        return super()._start_latents(shape, generator, latents, device)

    def _sample(self, latents, timesteps, text, negative, generator, callback):
        with self._window_within(latents.shape[2]):
            return self._sample_iteratively(latents, timesteps, text, negative, generator, callback)

    @contextmanager
    def _window_within(self, num_frames: int) -> Iterator[None]:
        """FreeNoise with a window no longer than the clip: a short one is then sampled as without FreeNoise."""
        modules = self.unet.modules() if self.free_noise_enabled else ()
        blocks = [module for module in modules if isinstance(module, FreeNoiseTransformerBlock)]
        lengths = [block.context_length for block in blocks]
        for block in blocks:
            block.context_length = min(block.context_length, num_frames)
        try:
            yield
        finally:
            for block, length in zip(blocks, lengths):
                block.context_length = length

    def _sample_iteratively(self, latents, timesteps, text, negative, generator, callback):
        """As often as FreeInit is set to."""
        if not self.free_init_enabled:
            return super()._sample(latents, timesteps, text, negative, generator, callback)
        steps, options = len(timesteps), (latents.device, latents.dtype, generator)
        for iteration in range(self._free_init_num_iters):
            latents, timesteps = self._apply_free_init(latents, iteration, steps, *options)
            latents = super()._sample(latents, timesteps, text, negative, generator, callback)
        return latents

    def _step_options(self, generator):
        return self.prepare_extra_step_kwargs(generator, self._eta)

    def _denoise(self, latents, t, text):
        options = {"cross_attention_kwargs": self._cross_attention_kwargs} if self._cross_attention_kwargs else {}
        return self.base_model.denoise(self.unet, latents, t.expand(len(latents)), text, **options)
