"""Clips sampled while training, to see how far it is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin

from ..conditioning import Conditioning
from ..distillation.draws import draw_normal, sample_generator
from ..distillation.student import Student
from ..files import atomic_folder
from ..video_io import comparison, write_image, write_mp4
from .disk import room_for


@torch.no_grad()
def sample_clip(
    student: Student,
    scheduler: SchedulerMixin,
    text: Conditioning,
    latent_shape: Sequence[int],
    num_inference_steps: int,
    seed: int,
    index: int,
) -> np.ndarray:
    """One clip by multistep consistency sampling; frames (T, H, W, 3) uint8. The same noise whenever it is called."""
    device = next(student.parameters()).device
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    generator = sample_generator(seed, "validation steps", index)
    latents = draw_normal(seed, "validation start", [index], latent_shape).to(device)
    for t in scheduler.timesteps:
        output = student.denoise(latents, t.reshape(1).to(device), text)
        latents, denoised = scheduler.step(output.float(), t, latents, generator=generator, return_dict=False)
    pixels = student.base.decode_video(student.vae, denoised, chunk_size=4)[0]  # (3, T, H, W)
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def write_validation(folder: Path, clips: dict[str, np.ndarray], fps: int) -> np.ndarray:
    """An mp4 per prompt and one picture of all of them, which is also returned (H, W, 3) uint8; all, or none."""
    picture = comparison({prompt: [clip] for prompt, clip in clips.items()}, [folder.name], frames_per_video=8)
    with room_for("the validation clips", folder), atomic_folder(folder) as temporary:
        for number, clip in enumerate(clips.values()):
            write_mp4(temporary / f"{number:02d}.mp4", clip, fps=fps)
        write_image(temporary / "overview.png", picture)
    return np.asarray(picture)
