"""One training step: the student's loss (eq. 2-5, 7, 9) and the discriminator's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..conditioning import Conditioning
from ..consistency import NoisePath
from .adversarial import AdversarialStep, GeneratorLoss
from .clips import EncodedClips
from .draws import StepDraws
from .losses import pseudo_huber, temporal_distance
from .method import MethodConfig
from .teacher import teacher_step
from .trajectory import mixed_start, neighbours, noisy_start, pick_frames


class StudentLosses(NamedTuple):
    """The total, which is minimised, and its parts; a part that a run does without is None."""

    total: torch.Tensor
    consistency: torch.Tensor
    generator: GeneratorLoss | None = None
    temporal: torch.Tensor | None = None


class Student(nn.Module):
    """Denoiser with LoRA and motion head, and the loss that trains both. The teacher is the same denoiser without it.

    A module, so that a data-parallel wrapper sees one forward pass per backward pass. `base`, a `BaseModel`, says how
    the two networks are called; `path` is the denoiser's. `teacher` makes a context in which the denoiser is without
    its LoRA. `fused` makes a function that is called like the denoiser, with the LoRA added to its weights; by default
    the denoiser itself is called.
    """

    def __init__(
        self,
        base: Any,
        denoiser: nn.Module,
        vae: nn.Module,
        path: NoisePath,
        motion: nn.Module,
        config: MethodConfig,
        teacher: Callable[[], AbstractContextManager],
        fused: Callable[[], Callable] | None = None,
    ):
        super().__init__()
        self.base, self.path, self.config = base, path, config
        self.denoiser, self.vae, self.teacher, self.fused = denoiser, vae, teacher, fused
        self.in_step = False  # whether all processes must call the denoiser equally often
        self.motion, self.target_motion = motion, copy.deepcopy(motion).requires_grad_(False)

    def encode_real(self, clips: torch.Tensor | EncodedClips, draws: StepDraws) -> torch.Tensor:
        """x_0 (B, C, T, h, w) float32 of the clips that start a trajectory; zeros for the others, not encoded.

        In a phase that does not start in noise the student's own samples start from clips, too.
        """
        starts = draws.coin < self.config.lambda_real if self.path.starts_in_noise else torch.ones_like(draws.coin)
        real = starts.nonzero().flatten().to(draws.noise.device)
        x_0 = torch.zeros_like(draws.noise)
        if len(real):
            noise = draws.encoder_noise[real]
            if isinstance(clips, EncodedClips):
                latents = self.base.sample_posterior(self.vae, clips.mean[real], clips.deviation[real], noise)
            else:
                latents = self.base.encode_video(self.vae, clips[real], noise)
            x_0.index_copy_(0, real, latents.to(x_0.dtype))
        return x_0

    def forward(
        self,
        clips: torch.Tensor | EncodedClips,
        text: Conditioning,
        negative_text: Conditioning,
        draws: StepDraws,
        adversary: AdversarialStep | None = None,
    ) -> StudentLosses:
        """Motion consistency distillation (eq. 9) on clips (B, 3, T, H, W) in [-1, 1], or on what was encoded of them;
        latents are (B, C, T, h, w)."""
        path, config, t = self.path, self.config, draws.timestep
        t_prev = path.previous_timestep(t, config.num_solver_steps)
        theta = partial(self.base.denoise, self.fused() if self.fused else self.denoiser)

        with torch.no_grad():
            x_0 = self.encode_real(clips, draws)
            start = (draws.start_noise, draws.coin, config.lambda_real, text)
            x_end = mixed_start(theta, path, x_0, *start, in_step=self.in_step)
            x_t = noisy_start(path, x_end, draws.noise, t)
            with self.teacher():  # eq. 2
                phi = partial(self.base.denoise, self.denoiser)
                x_prev = teacher_step(phi, path, x_t, t, t_prev, text, negative_text, draws.guidance)
            target = path.consistency_function(theta(x_prev, t_prev, text), x_prev, t_prev)  # f(·; θ⁻), eq. 1

        output = theta(x_t, t, text)
        prediction = path.consistency_function(output, x_t, t)  # f(·; θ)
        with torch.autocast(x_t.device.type, enabled=False):  # what c = 0.001 tells apart, half types do not
            distance = pseudo_huber(self.motion(prediction), self.target_motion(target), config.huber_c)  # eq. 3, 6
            temporal = temporal_distance(prediction, target, config.huber_c) if config.lambda_temporal else None
        total = distance if temporal is None else distance + config.lambda_temporal * temporal
        if adversary is None:
            return StudentLosses(total, distance, temporal=temporal)
        num_frames = clips.num_frames if isinstance(clips, EncodedClips) else clips.shape[2]
        frames = pick_frames(num_frames, draws.frames)  # (B, l)
        clean = prediction if path.ends_clean else path.predict_x0(output, x_t, t)
        decode = partial(self.base.decode_frames, self.vae, clean, decoder=config.frame_decoder)
        beside = decode(neighbours(frames, num_frames)) if config.lambda_change else None
        generator = adversary.generator_loss(decode(frames), beside)
        total = total + config.lambda_adv * generator.loss
        if generator.change_loss is not None:
            total = total + config.lambda_change * generator.change_loss
        return StudentLosses(total, distance, generator, temporal)
