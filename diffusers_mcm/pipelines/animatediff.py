"""Text to video with AnimateDiff."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
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
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..base_models.animatediff import ADAPTER, AnimateDiff, has_motion, load_motion_adapter, with_motion
from ..location import HUB_OPTIONS, Location
from ..lora import lora_layers
from ..settings import SAMPLING_KEYS
from ..wording import first_names
from . import checks
from .animatediff_extras import AnimateDiffExtras
from .loading import load_checkpoint
from .mcm import MCMPipeline, MCMPipelineOutput
from .request import arguments
from .sole_use import alone, one_call

logger = logging.getLogger(__name__)

# Options of loading that are no components.
_OF_FOLDERS = ("dtype", "variant", "use_safetensors", "revision", "low_cpu_mem_usage", "device_map")


@alone(
    *("enable_free_noise", "disable_free_noise", "enable_free_noise_split_inference", "enable_free_init"),
    *("disable_free_init", "enable_freeu", "disable_freeu", "fuse_qkv_projections", "unfuse_qkv_projections"),
    *("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"),
    *("load_textual_inversion", "unload_textual_inversion"),
)
class AnimateDiffMCMPipeline(AnimateDiffExtras, MCMPipeline, AnimateDiffPipeline):
    """Few-step text to video with AnimateDiff.

    Args:
        vae ([`AutoencoderKL`]): Encodes and decodes single frames.
        text_encoder ([`CLIPTextModel`]), tokenizer ([`CLIPTokenizer`]): Encode the prompt.
        unet ([`UNetMotionModel`] or [`UNet2DConditionModel`]): The denoiser, or the one to put motion modules in.
        scheduler ([`MCMScheduler`]): Any scheduler of diffusers works too, for comparison.
        motion_adapter ([`MotionAdapter`], *optional*): Motion modules. Copied into the UNet, and not kept.
        feature_extractor, image_encoder (*optional*): Encode the pictures for an IP-Adapter.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model: AnimateDiff = AnimateDiff()

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
        fps: int | float | None = None,
    ):
        given = arguments(locals()) | {"unet": with_motion(unet, motion_adapter), "motion_adapter": None}
        super().__init__(**{name: value for name, value in given.items() if name not in SAMPLING_KEYS})
        self._set_up(**given)
        if isinstance(unet, UNet2DConditionModel):
            self._warn_of_betas()

    def _warn_of_betas(self) -> None:
        betas = self.scheduler.config.get("beta_schedule")
        if betas != "linear":
            logger.warning(
                "The scheduler has the %s betas of an image model; the motion modules were trained on linear ones:"
                ' pipe.scheduler = MCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear").',
                betas,
            )

    @classmethod
    def _load_components(cls, location: Location, index: Mapping[str, Any], elsewhere: Mapping[str, str], **options):
        complete = isinstance(options.get("unet"), UNetMotionModel) or has_motion(index)
        adapter = options.pop(ADAPTER, None) or (None if complete else elsewhere.get(ADAPTER))
        found: dict[str, Any] = {}
        if location.is_file:  # first, for a file that is none is refused before anything is downloaded for it
            name = os.fspath(options.pop("config", None) or cls.base_model.default_repository)
            found = load_checkpoint(location.name, name, options["dtype"], **location.options)
        if adapter is not None:
            where = dict(location.options, variant=options.get("variant"))
            adapter = load_motion_adapter(adapter, options["dtype"], **where)
        if location.is_file:
            found["scheduler"] = cls.base_model.image_models_scheduler(found["scheduler"].config)
            found |= cls._components_among(options)
            pipeline = cls(**found, motion_adapter=adapter)
            pipeline.register_to_config(_name_or_path=location.name)
            return pipeline
        if elsewhere and "scheduler" not in options:
            config = location.inside("scheduler").json("scheduler_config.json")
            options["scheduler"] = cls.base_model.image_models_scheduler(config)
        if adapter is not None or complete:
            options[ADAPTER] = None if complete else adapter  # what is in the repository need not be read
        pipeline = super()._load_components(location, index, elsewhere, **options)
        if complete and adapter is not None:
            pipeline.unet.load_motion_modules(adapter)
        return pipeline

    @classmethod
    def _components_among(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What of the options of loading a checkpoint in one file is for the pipeline itself.

        `ValueError` for a `device_map`; what is not known is passed over with a warning, as diffusers does it.
        """
        if options.get("device_map") is not None:
            raise ValueError("`device_map` is for models in a folder; move what is made of one file by `.to(device)`.")
        known = inspect.signature(cls.__init__).parameters
        strange = options.keys() - {*known, *HUB_OPTIONS, *_OF_FOLDERS}
        if strange:
            logger.warning("%s is passed over, which %s does not take.", first_names(sorted(strange)), cls.__name__)
        return {name: given for name, given in options.items() if name in known}

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike, **kwargs):
        """[`~MCMPipeline.from_pretrained`], under the name that diffusers has for a checkpoint in one file."""
        return cls.from_pretrained(pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a pipeline of another, as diffusers does; Stable Diffusion's needs a `motion_adapter` besides.

        Its scheduler stays behind unless one is given: the image model's betas are not those of the motion modules. An
        AnimateDiff pipeline keeps its own, with a warning where it has such betas.
        """
        unet = kwargs.get("unet", pipeline.unet)
        if isinstance(unet, UNet2DConditionModel):
            if lora_layers(unet):
                raise ValueError(
                    "A LoRA is loaded in the Stable Diffusion pipeline: `unload_lora_weights()` there first, and load"
                    " it here."
                )
            kwargs.setdefault("scheduler", cls.base_model.image_models_scheduler(pipeline.scheduler.config))
            return super().from_pipe(pipeline, **kwargs)
        made = super().from_pipe(pipeline, **kwargs)
        made._warn_of_betas()
        return made

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Fuse projections as diffusers does; a LoRA has to be fused before, for beside them it would do nothing."""
        layers = [name for name in self._layers if name.endswith((".to_q", ".to_k", ".to_v"))]
        if unet and layers and not self.fused_loras:
            raise ValueError(
                f"Cannot fuse the attention's projections while a LoRA lies on them ({len(layers)}, such as"
                f" {layers[0]!r}): `fuse_lora()` first, or unload it."
            )
        super().fuse_qkv_projections(unet, vae)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as [`MCMPipeline`] does; an IP-Adapter, which diffusers cannot load again, has to go before."""
        if self._ip_adapters:
            raise ValueError("An IP-Adapter cannot be saved with the pipeline; `unload_ip_adapter()` first.")
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_free_noise(self, context_length: int | None = 16, *args, **kwargs) -> None:
        """Switch FreeNoise on, with LoRAs loaded too; a clip of fewer frames than the context has one window."""
        context_length = context_length or self.unet.config.motion_max_seq_length
        self.motion_adapter = self.unet  # which knows the longest clip as well
        try:
            with self._clean_networks():  # new blocks are made from the weights of the old
                super().enable_free_noise(context_length, *args, **kwargs)
        finally:
            self.motion_adapter = None

    def disable_free_noise(self) -> None:
        """Switch FreeNoise off, with LoRAs loaded too."""
        with self._clean_networks():
            super().disable_free_noise()

    def enable_free_noise_split_inference(self, *args, **kwargs) -> None:
        """diffusers' own; it gives the modules other names, by which those that were fused before are not found."""
        self._require_unfused("split the inference")
        super().enable_free_noise_split_inference(*args, **kwargs)

    # --- sampling ----------------------------------------------------------------------------------------------------
    @one_call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | dict[int, str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | dict[int, str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[MCMPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = 16,
        timesteps: Sequence[float] | None = None,
        lora_scale: float | None = None,
    ) -> MCMPipelineOutput | tuple:
        """Make videos. The arguments are those of diffusers' `AnimateDiffPipeline` in their order, and two of ours.

        Args:
            prompt, negative_prompt: With FreeNoise also a text for each of some frames, the first of them 0; in
                between they are mixed.
            eta: How much noise DDIM adds at each step, up to 1 for as much as DDPM; not for other schedulers.
            prompt_embeds, negative_prompt_embeds: Encoded prompts, `(B, length, features)`, or
                `(B, T, length, features)` with a text for each frame.
            ip_adapter_image, ip_adapter_image_embeds: For a loaded IP-Adapter, a picture, or its embedding as
                diffusers defines it; one entry an adapter.
            cross_attention_kwargs: `scale` is `lora_scale`; all else (`ip_adapter_masks`) is for the attention layers.
            clip_skip: How many of the last layers of the text encoder to leave out.

        All others are those of every pipeline, see [`MCMPipeline.__call__`].

        Returns:
            [`MCMPipelineOutput`] or, without `return_dict`, a `tuple` whose first element is the videos.

        Examples:
            ```py
            >>> import torch
            >>> from diffusers.utils import export_to_gif
            >>> from diffusers_mcm import AnimateDiffMCMPipeline

            >>> pipe = AnimateDiffMCMPipeline.from_pretrained("yhzhai/mcm", subfolder="animatediff-laion")
            >>> generator = torch.Generator().manual_seed(0)
            >>> frames = pipe("a corgi running on the beach", generator=generator).frames[0]
            >>> len(frames)
            16
            >>> export_to_gif(frames, "corgi.gif")
            'corgi.gif'
            ```
        """
        eta = checks.number("eta", eta)  # `None` would be the scheduler's own
        return self._make_videos(**arguments(locals()))
