"""What diffusers' AnimateDiff pipeline offers besides, with LoRAs loaded: FreeNoise, FreeInit and IP-Adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.attention import FreeNoiseTransformerBlock

from ..base_models.animatediff import IMAGE_EMBEDS
from ..conditioning import Conditioning
from . import checks
from .request import Request, Texts, arguments
from .sampling import Sampling


class AnimateDiffExtras(Sampling):
    """The mixin of `AnimateDiffMCMPipeline` that changes how it samples.

    A clip of FreeNoise may have a text for each frame: prompts are then a dictionary of some frames' texts, and what
    they are encoded to is `(B, T, length, features)`.
    """

    _takes_attention_options = True
    # What diffusers' properties of these names tell a callback.
    _clip_skip: int | None = None
    _cross_attention_kwargs: dict[str, Any] | None = None

    def check_inputs(  # type: ignore[override]  # diffusers orders the arguments of this pipeline otherwise
        self,
        prompt: Texts | None,
        height: int | None = None,
        width: int | None = None,
        callback_steps: int | None = None,
        negative_prompt: Texts | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
    ) -> None:
        """Check as [`MCMPipeline`] does; pictures need an IP-Adapter, and an IP-Adapter needs pictures."""
        self._check_inputs(**arguments(locals()))

    def _check(self, request: Request) -> None:
        super()._check(request)
        pictures, embeds, adapters = request.ip_adapter_image, request.ip_adapter_image_embeds, self._ip_adapters
        if pictures is not None and embeds is not None:
            raise ValueError("Give either `ip_adapter_image` or `ip_adapter_image_embeds`, not both.")
        name, each = ("ip_adapter_image", pictures) if embeds is None else ("ip_adapter_image_embeds", embeds)
        if (each is None) != (adapters == 0):
            raise ValueError(
                "An IP-Adapter and a picture go together: "
                + ("a picture was given, but no IP-Adapter is loaded." if adapters == 0 else f"give `{name}`.")
            )
        if pictures is not None and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError(
                "`ip_adapter_image` needs an `image_encoder` and a `feature_extractor` in the pipeline; give"
                " `ip_adapter_image_embeds` without."
            )
        count = len(each) if isinstance(each, list) else 1
        if adapters and count != adapters:
            raise ValueError(f"`{name}` must be a list of one for each of the {adapters} IP-Adapters, got {count}.")

    def _check_texts(self, request: Request) -> None:
        texts = {name: self._one_of_the_texts(name, getattr(request, name)) for name in ("prompt", "negative_prompt")}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            texts[name] = embeds = getattr(request, name)
            if isinstance(embeds, torch.Tensor) and embeds.ndim == 4:  # checked as so many prompts more
                if (count := embeds.shape[1]) != request.num_frames:
                    raise ValueError(f"`{name}` has texts for {count} frames of a clip of {request.num_frames}.")
                texts[name] = embeds.flatten(0, 1)
        super()._check_texts(replace(request, **texts))

    def _one_of_the_texts(self, name: str, value: Any) -> Any:
        """Return a prompt, but of one that has texts for some frames the first text."""
        if not isinstance(value, Mapping):
            return value
        if not self.free_noise_enabled:
            raise ValueError(f"`{name}` may be a dictionary of frames only after `enable_free_noise()`.")
        frames_fit = all(isinstance(frame, int) and frame >= 0 for frame in value) and 0 in value
        if not frames_fit or not all(isinstance(text, str) for text in value.values()):
            raise ValueError(f"`{name}` must name a text for frame 0, and for any later frames, got {value!r}.")
        return value[0]

    @property
    def _ip_adapters(self) -> int:
        """How many are loaded."""
        projection = self.unet.encoder_hid_proj
        return 0 if projection is None else len(projection.image_projection_layers)

    def prepare_latents(
        self, batch_size, num_channels_latents, num_frames, height, width, dtype, device, generator, latents=None
    ) -> torch.Tensor:
        """Draw noise as [`MCMPipeline`] does; with FreeNoise the noise of a long clip repeats itself."""
        size, dtype = (num_frames, height, width), torch.promote_types(dtype, torch.float32)
        if self.free_noise_enabled:
            several = latents is None and isinstance(generator, (list, tuple))
            each = [(1, one) for one in generator] if several else [(batch_size, generator)]
            options = (num_channels_latents, *size, dtype, device)
            noise = [self._prepare_latents_free_noise(count, *options, one, latents) for count, one in each]
            latents = torch.cat(noise)
        return super().prepare_latents(batch_size, num_channels_latents, *size, dtype, device, generator, latents)

    def _check_latents(self, latents: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Check latents; with FreeNoise they may be the noise of one window, which is repeated."""
        repeated = self.free_noise_enabled and self._free_noise_noise_type == "repeat_context"
        if repeated and getattr(latents, "ndim", 0) == 5 and latents.shape[2] == self._free_noise_context_length:
            shape = (*shape[:2], self._free_noise_context_length, *shape[3:])
        super()._check_latents(latents, shape)

    def _encode(self, prompt, prompt_embeds: torch.Tensor | None, request: Request, device) -> Conditioning:
        if isinstance(prompt, Mapping):
            prompt_embeds = self._encode_frames(prompt, request)
        elif prompt is not None:  # textual inversion
            prompt = self.maybe_convert_prompt([prompt] if isinstance(prompt, str) else list(prompt), self.tokenizer)
        text = super()._encode(prompt, prompt_embeds, request, device)
        embeds = text["prompt_embeds"]
        if self.free_noise_enabled and embeds.ndim == 3:  # one of the two texts may be one per frame
            text["prompt_embeds"] = embeds[:, None].expand(-1, request.num_frames, -1, -1)
        return text

    def _encode_frames(self, prompts: Mapping[int, str], request: Request) -> torch.Tensor:
        """Encode texts for some frames to `(1, T, length, features)`; between two frames theirs are mixed."""
        last = request.num_frames - 1
        if max(prompts) > last:
            raise ValueError(f"There is a text for frame {max(prompts)} of a clip of {last + 1}, counted from 0.")
        texts_of = {last: prompts[max(prompts)], **prompts}
        frames = sorted(texts_of)
        texts = self.maybe_convert_prompt([texts_of[frame] for frame in frames], self.tokenizer)
        encoded = self.base_model.encode_text(self.tokenizer, self.text_encoder, texts, request.clip_skip or 0)
        embeds = encoded["prompt_embeds"].split(1)
        mixed = embeds[0].expand(request.num_frames, -1, -1).clone()
        for start, end, first, second in zip(frames, frames[1:], embeds, embeds[1:]):
            mixed[start : end + 1] = self._free_noise_prompt_interpolation_callback(start, end, first, second)
        return mixed[None]

    def _add_conditions(self, request: Request, text: Conditioning, negative: Conditioning | None, device) -> None:
        """Add the pictures of the IP-Adapters."""
        if not self._ip_adapters:
            return
        given, guided = request.ip_adapter_image_embeds, negative is not None
        if given is not None:
            self._check_image_embeds(given, rows=2 if guided else 1)
        videos = len(text["prompt_embeds"])
        found = self.prepare_ip_adapter_image_embeds(request.ip_adapter_image, given, device, videos, guided)
        for i, embeds in enumerate(found):
            embeds = embeds.to(self.unet.dtype)
            if negative is not None:
                negative[f"{IMAGE_EMBEDS}{i}"], embeds = embeds.chunk(2)
            text[f"{IMAGE_EMBEDS}{i}"] = embeds

    def _check_image_embeds(self, given: Any, rows: int) -> None:
        """`(rows, images, [length,] features)` for each IP-Adapter."""
        name, shape = "ip_adapter_image_embeds", f"({rows}, images, [length,] features)"
        if not isinstance(given, list):
            raise ValueError(f"`{name}` must be a list of one tensor for each IP-Adapter, got {checks.shown(given)}.")
        for each in given:
            checks.check_numbers(name, each, shape)
            if each.ndim not in (3, 4) or len(each) != rows:
                why = ", under guidance the negative first" if rows == 2 else ""
                raise ValueError(f"`{name}` must be of the shape {shape}{why}, got {tuple(each.shape)}.")

    def _sample(self, latents, timesteps, text, negative, request, callback):
        """Sample as often as FreeInit says; diffusers' properties tell a callback what the call was given.

        FreeNoise's window is kept within the clip: a short one is sampled as without FreeNoise.
        """
        self._clip_skip, self._cross_attention_kwargs = request.clip_skip, request.attention_options or None
        modules = self.unet.modules() if self.free_noise_enabled else ()
        windows = {block: block.context_length for block in modules if isinstance(block, FreeNoiseTransformerBlock)}
        steps = len(timesteps)
        try:
            for block, length in windows.items():
                block.context_length = min(length, request.num_frames)
            for iteration in range(self._free_init_num_iters if self.free_init_enabled else 1):
                if self.free_init_enabled:
                    options = (latents.device, latents.dtype, request.generator)
                    latents, timesteps = self._apply_free_init(latents, iteration, steps, *options)
                latents = super()._sample(latents, timesteps, text, negative, request, callback)
        finally:
            for block, length in windows.items():
                block.context_length = length
            self._clip_skip = self._cross_attention_kwargs = None
        return latents
