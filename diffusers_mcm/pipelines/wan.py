"""Text to video with Wan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from ..base_models.wan import Wan, WanTI2V
from ..conditioning import Conditioning
from ..location import HUB_OPTIONS, Location
from .callbacks import guided
from .mcm import MCMPipeline
from .wan_files import load_wan_transformer, wan_repository


class WanMCMPipeline(MCMPipeline):
    """Few-step text to video with Wan 2.1.

    Args:
        vae ([`AutoencoderKLWan`]): Encodes and decodes videos of 4k + 1 frames.
        text_encoder ([`UMT5EncoderModel`]), tokenizer ([`T5Tokenizer`]): Encode the prompt.
        transformer ([`WanTransformer3DModel`]): The denoiser.
        scheduler ([`MCMFlowScheduler`]): Any flow-matching scheduler of diffusers works too, for comparison.
        transformer_2, boundary_ratio: Of [`WanA14BMCMPipeline`], and as those of `WanPipeline` there to be `None`.
        expand_timesteps (`bool`, *optional*): Whether `WanPipeline` gives each token a timestep, which marks Wan 2.2
            TI2V.
        height, width, num_frames, num_inference_steps, fps (`int`, *optional*): What a call defaults to.
    """

    base_model = Wan()
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["transformer_2"]

    def __init__(
        self,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: T5Tokenizer,
        transformer: WanTransformer3DModel,
        scheduler: SchedulerMixin,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        fps: int | float | None = None,
    ):
        if text_encoder is not None:
            check_embeddings(text_encoder)
        networks = dict(vae=vae, text_encoder=text_encoder, transformer=transformer, transformer_2=transformer_2)
        sampling = dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps)
        self._set_up(**networks, **sampling, fps=fps, tokenizer=tokenizer, scheduler=scheduler)
        expand = self.base_model.expand_timesteps if expand_timesteps is None else expand_timesteps
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand)

    @classmethod
    def _load_components(
        cls, location: Location, index: Mapping[str, Any], elsewhere: Mapping[str, str], **options
    ) -> MCMPipeline:
        """Of a transformer in one file all that is not in it comes from `config`, or where a Wan of its size is."""
        if not location.is_file:
            return super()._load_components(location, index, elsewhere, **options)
        config = options.pop("config", None) or wan_repository(location.name)
        dtype = options.get("dtype", torch.float32)
        options["transformer"] = load_wan_transformer(location.name, config, **options | {"dtype": dtype})
        place = Location.of(config, **{name: options[name] for name in HUB_OPTIONS if name in options})
        return super()._load_components(place, index, elsewhere, **options)

    def _predict(self, latents, t, text, negative, options: Mapping[str, Any]) -> torch.Tensor:
        """The network's output; under guidance by two calls, as in `WanPipeline`, so that caches such as
        `FirstBlockCacheConfig` keep apart what they remember of either."""
        denoiser, guidance_scale = self._denoiser_at(t)
        index = self.scheduler.step_index or 0
        step = dict(step_index=index, sigma=float(self.scheduler.sigmas[index]))
        step["num_inference_steps"] = self._num_timesteps

        def predict(name: str, text: Conditioning) -> torch.Tensor:
            with denoiser.cache_context(name, **step):
                return self.base_model.denoise(denoiser, latents, t.expand(len(latents)), text, **options)

        given = predict("cond", text)
        if not guided(self, negative) or guidance_scale == 1:
            return given
        without = predict("uncond", negative)
        return without + guidance_scale * (given - without)

    def _denoiser_at(self, t: torch.Tensor) -> tuple[Any, float]:
        """The network that is asked at a timestep, and how strongly it is guided."""
        return self.denoiser, self._guidance_scale


def check_embeddings(text_encoder: UMT5EncoderModel) -> None:
    """`ValueError` if the encoder reads other embeddings of tokens than its file holds: some releases of transformers
    leave those empty that it reads, and every prompt then means the same."""
    stored, read = text_encoder.shared.weight, text_encoder.encoder.embed_tokens.weight
    if stored is read or stored.is_meta or stored.device != read.device or torch.equal(stored, read):
        return
    raise ValueError(
        "Expected a text encoder whose `encoder.embed_tokens` are its `shared` embeddings; got others. This"
        " release of transformers does not load UMT5 as it should: upgrade it (5.23 does)."
    )


class WanTI2VMCMPipeline(WanMCMPipeline):
    """Few-step text to video with Wan 2.2 TI2V-5B; its components are of the classes of Wan 2.1's."""

    base_model = WanTI2V()
