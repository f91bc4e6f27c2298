"""What a call of a pipeline does, step by step; a base model's pipeline replaces what is different with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..conditioning import Conditioning, concatenate
from . import checks
from .callbacks import guided
from .request import Request, Texts, arguments


class Sampling(DiffusionPipeline):
    """The mixin of `MCMPipeline` that samples."""

    _takes_attention_options = False  # whether `cross_attention_kwargs` may hold more than the LoRA's scale

    # --- diffusers' own steps of a call ------------------------------------------------------------------------------
    def check_inputs(
        self,
        prompt: Texts | None,
        height: int | None = None,
        width: int | None = None,
        callback_steps: int | None = None,
        negative_prompt: Texts | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
    ) -> None:
        """Raise `ValueError` if the texts or the size of a call are none that the networks take.

        The arguments are those of the call; a size that is left open is the default. `callback_steps` is diffusers'
        of old and has no effect.
        """
        self._check_inputs(**arguments(locals()))

    def encode_prompt(
        self,
        prompt: Texts | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: Texts | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        num_frames: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts, to be given to calls as `prompt_embeds` and `negative_prompt_embeds`.

        Args:
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds: As in a call.
            device: Where the results shall be; by default where the pipeline computes.
            num_images_per_prompt: How often each prompt is repeated in the results.
            do_classifier_free_guidance: Whether to encode the negative prompts, too.
            lora_scale: Strength of the LoRAs on the text encoder, times their weights.
            clip_skip: How many of the text encoder's last layers to leave out, if it is CLIP's.
            num_frames: The length of the clip, where the prompt has a text for each of some frames.

        Returns:
            `(B, length, features)` for the prompts and, under guidance, for the negative ones; `None` otherwise.
        """
        asked = arguments(locals())
        for name in ("device", "num_images_per_prompt", "do_classifier_free_guidance"):
            del asked[name]
        request = self._request(**asked, num_videos_per_prompt=num_images_per_prompt)
        self._check_texts(request)
        with self._lora_scaled(request.lora_scale):
            device = self._execution_device if device is None else device
            text, negative = self._encode_texts(request, do_classifier_free_guidance, device)
        return text["prompt_embeds"], None if negative is None else negative["prompt_embeds"]

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        num_frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise `(B, C, T, H, W)` to start from, for videos of a size in pixels.

        It is `latents` if they are given, scaled for the scheduler. Its type is float32, or `dtype` if that is wider:
        between two steps latents are not rounded to what the networks compute in.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        if latents is None:
            _, *size = self.base_model.latent_shape(self.denoiser, self.vae, num_frames, height, width)
            shape = (batch_size, num_channels_latents, *size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow ones have none

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int | None = 16) -> torch.Tensor:
        """Latents `(B, C, T, H, W)` to pixels `(B, 3, T, H, W)` in [-1, 1], so many frames at a time (`None`: all)."""
        video = self.base_model.decode_video(self.vae, latents, decode_chunk_size)
        checks.check_decoded(video, self.vae)
        return video

    # --- what is asked for -------------------------------------------------------------------------------------------
    def _request(self, num_frames: Any = None, height: Any = None, width: Any = None, **asked) -> Request:
        """The arguments of a call, with this pipeline's sizes where the caller leaves them open."""
        sizes: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
        for name, size in sizes.items():
            sizes[name] = checks.whole_number(name, self.sampling_default(name) if size is None else size)
        return Request(**sizes, **asked)

    def _check_inputs(self, callback_steps: Any, callback_on_step_end_tensor_inputs: Any, **asked) -> None:
        if callback_steps is not None:
            checks.whole_number("callback_steps", callback_steps, least=1)
        if callback_on_step_end_tensor_inputs is not None:
            name = "callback_on_step_end_tensor_inputs"
            checks.check_names(name, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self._check(self._request(**asked))

    def _check(self, request: Request) -> None:
        """Raise `ValueError` if a call is asked for what the networks do not take."""
        self.base_model.latent_shape(self.denoiser, self.vae, request.num_frames, request.height, request.width)
        self._check_texts(request)
        if request.attention_options and not self._takes_attention_options:
            others = ", ".join(map(repr, request.attention_options))
            raise ValueError(f"`cross_attention_kwargs` takes only 'scale', got {others}.")
        if request.clip_skip is not None and self.text_encoder is not None:
            request.clip_skip = checks.whole_number("clip_skip", request.clip_skip, least=0)
            if request.clip_skip > (layers := self.text_encoder.config.num_hidden_layers):
                what = f"at most {layers}, the layers of the text encoder"
                raise ValueError(f"`clip_skip` must be {what}, got {request.clip_skip}.")

    def _check_texts(self, request: Request) -> None:
        """Raise `ValueError` if the texts are none for a clip, or too many."""
        texts = (request.prompt, request.negative_prompt, request.prompt_embeds, request.negative_prompt_embeds)
        checks.check_texts(*texts, self.base_model.text_features(self.denoiser))

    def _check_latents(self, latents: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` if latents that a caller gives are no noise for videos of this shape."""
        checks.check_tensor("latents", latents, shape)

    # --- what it starts from -----------------------------------------------------------------------------------------
    def _encode_texts(self, request: Request, guided: bool, device) -> tuple[Conditioning, Conditioning | None]:
        """The condition of every video and, under guidance, the negative one."""
        text = self._encode(request.prompt, request.prompt_embeds, request, device)
        if not guided:
            return text, None
        prompts, count = request.negative_prompt, request.count_prompts()
        if prompts is None or isinstance(prompts, str):
            prompts = [self.base_model.negative_prompt if prompts is None else prompts] * count
        negative = self._encode(prompts, request.negative_prompt_embeds, request, device)
        shapes = [tuple(each["prompt_embeds"].shape) for each in (text, negative)]
        if shapes[0] != shapes[1]:
            names = "`prompt_embeds` and `negative_prompt_embeds`"
            raise ValueError(f"{names} must have the same shape, got {shapes[0]} and {shapes[1]}.")
        return text, negative

    def _encode(self, prompt, prompt_embeds: torch.Tensor | None, request: Request, device) -> Conditioning:
        """The condition of every video, of prompts or of what they are encoded to."""
        if prompt_embeds is not None:
            text = self.base_model.embeds_condition(prompt_embeds)
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            options = {} if request.clip_skip is None else {"clip_skip": request.clip_skip}
            text = self.base_model.encode_text(self.tokenizer, self.text_encoder, prompts, **options)
        repeats = request.num_videos_per_prompt
        text = {key: value.to(device).repeat_interleave(repeats, 0) for key, value in text.items()}
        return text | {"prompt_embeds": text["prompt_embeds"].to(self.denoiser.dtype)}

    def _add_conditions(self, request: Request, text: Conditioning, negative: Conditioning | None, device) -> None:
        """Add to the texts what else a base model's network is conditioned on."""

    def _set_timesteps(self, request: Request, device) -> torch.Tensor:
        """The timesteps that the scheduler is going to visit."""
        if request.timesteps is None:
            steps = request.num_inference_steps or self.sampling_default("num_inference_steps")
            self.scheduler.set_timesteps(checks.whole_number("num_inference_steps", steps, least=1), device=device)
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(timesteps=request.timesteps, device=device)
        else:
            raise ValueError(f"{type(self.scheduler).__name__} takes no `timesteps`.")
        return self.scheduler.timesteps

    # --- the loop ----------------------------------------------------------------------------------------------------
    def _sample(self, latents, timesteps, text, negative, request: Request, callback) -> torch.Tensor:
        """Sample from noise to clean latents."""
        taken = inspect.signature(self.scheduler.step).parameters  # a deterministic one takes no generator
        given = {"generator": request.generator, "eta": request.eta}
        options = {name: value for name, value in given.items() if name in taken and value is not None}
        network_options = {"cross_attention_kwargs": request.attention_options} if request.attention_options else {}
        self._num_timesteps = len(timesteps)
        try:
            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self._interrupt:
                        break
                    self._current_timestep = t
                    output = self._predict(latents, t, text, negative, network_options)
                    latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[0]
                    if callback is not None:
                        latents = callback(self, i, t, latents, text, negative)
                    progress_bar.update()
        finally:
            self._current_timestep = None
        return latents

    def _predict(self, latents, t, text, negative, options: Mapping[str, Any]) -> torch.Tensor:
        """The network's output, with guidance if there is any; one call either way."""
        is_guided = guided(self, negative)
        if is_guided:
            latents, text = torch.cat([latents, latents]), concatenate(negative, text)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        output = self.base_model.denoise(self.denoiser, latents, t.expand(len(latents)), text, **options)
        if not is_guided:
            return output
        without, given = output.chunk(2)
        return without + self._guidance_scale * (given - without)
