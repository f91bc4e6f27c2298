"""What a call of a pipeline does, step by step; a base model's pipeline replaces what is different with it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from . import checks
from .callbacks import StepCallback, guided

logger = logging.getLogger(__name__)


class Sampling:
    """Mixin of `MCMPipeline`; needs `denoiser` and `base_model`."""

    # --- the loop ----------------------------------------------------------------------------------------------------
    def _sample(self, latents, timesteps, text, negative, generator, callback: StepCallback | None) -> torch.Tensor:
        """From noise to a clean sample."""
        options = self._step_options(generator)
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                output = self._predict(latents, t, text, negative)
                latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[0]
                if callback is not None:
                    latents = callback(self, i, t, latents, text, negative)
                progress_bar.update()
        return latents

    def _step_options(self, generator) -> dict[str, Any]:
        """What the scheduler's step takes; deterministic ones take no generator."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def _predict(self, latents, t, text, negative) -> torch.Tensor:
        """The network's output, with guidance if there is any; one call either way."""
        if not guided(self, negative):
            return self._denoise(self.scheduler.scale_model_input(latents, t), t, text)
        latents = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
        both = {key: torch.cat([negative[key], text[key]]) for key in text}
        without, given = self._denoise(latents, t, both).chunk(2)
        return without + self._guidance_scale * (given - without)

    def _denoise(self, latents, t, text) -> torch.Tensor:
        return self.base_model.denoise(self.denoiser, latents, t.expand(len(latents)), text)

    # --- what it starts from -----------------------------------------------------------------------------------------
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
            self.scheduler.set_timesteps(timesteps=checks.timesteps_list(timesteps), device=device)
        else:
            steps = (
                self.sampling_default("num_inference_steps") if num_inference_steps is None else num_inference_steps
            )
            self.scheduler.set_timesteps(checks.whole_number("num_inference_steps", steps, least=1), device=device)
        return self.scheduler.timesteps

    def _start_latents(self, shape, generator, latents, device) -> torch.Tensor:
        dtype = self._latents_dtype  # once: diffusers walks over all modules to find it
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    # --- checks ------------------------------------------------------------------------------------------------------
    def _size(self, *given: int | None) -> list[int]:
        """`num_frames`, `height` and `width`, from the defaults where the caller leaves them open."""
        names = ("num_frames", "height", "width")
        sizes = [self.sampling_default(name) if size is None else size for name, size in zip(names, given)]
        return [checks.whole_number(name, size) for name, size in zip(names, sizes)]

    def _check_texts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_frames: int, guidance_scale: float
    ) -> int:
        """How many prompts there are."""
        checks.check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None:
                self._check_prompt(name, value)
        embeds = (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds))
        for name, value in embeds:
            if value is not None:
                self._check_embeds(name, value, num_frames)
        count = len(prompt_embeds) if prompt is None else len(prompt) if isinstance(prompt, (list, tuple)) else 1
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != count:
            raise ValueError(f"{len(negative_prompt)} negative prompts were given for {count} prompts.")
        if guidance_scale <= 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
            logger.warning(
                "The negative prompt has no effect at guidance_scale=%g; it needs a scale above 1.", guidance_scale
            )
        return count

    def _check_prompt(self, name: str, value) -> None:
        checks.check_prompt(name, value)

    def _check_embeds(self, name: str, embeds, num_frames: int) -> None:
        features = self.denoiser.config.get("cross_attention_dim")
        checks.check_embeds(name, embeds, features if isinstance(features, int) else None)

    def _check_latents(self, latents, shape: tuple[int, ...]) -> None:
        checks.check_latents(latents, shape)
