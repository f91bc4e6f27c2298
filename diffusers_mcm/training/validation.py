"""Clips sampled while training, to see how far it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..distillation.draws import draw_normal, sample_generator
from ..files import atomic_folder
from ..pipelines.checks import NotFiniteError
from ..video_io import comparison, to_uint8, write_image, write_mp4
from .config import TrainingConfig
from .disk import room_for
from .networks import TrainingNetworks


class NonFiniteSample(FloatingPointError):
    """A clip of the student would hold NaN or infinite values; as pixels they would be black, or anything."""


def sample_clip(networks: TrainingNetworks, config: TrainingConfig, prompt: str, index: int) -> np.ndarray:
    """A clip of the student by its pipeline, frames (T, H, W, 3) uint8. The same noise whenever it is called.

    Of the expert that begins it is what is clean in its predictions, as the discriminator sees it: motion and layout
    without the details.

    `NonFiniteSample` if the network or the VAE makes values that are not finite.
    """
    steps: dict[str, Any] = {"num_inference_steps": config.num_inference_steps}
    if config.expert is not None:
        path, grid = networks.student.path, config.method.num_solver_steps
        steps = {"timesteps": path.visited_timesteps(config.num_inference_steps, grid).tolist()}
    try:
        videos = networks.pipeline(
            prompt_embeds=networks.text([prompt])["prompt_embeds"],
            **dict(zip(("num_frames", "height", "width"), networks.clip_size)),
            **steps,
            latents=draw_normal(config.seed, "validation start", [index], networks.latent_shape),
            generator=sample_generator(config.seed, "validation steps", index),
            decode_chunk_size=4,
            output_type="np",
        ).frames
    except NotFiniteError as error:
        raise NonFiniteSample(
            f"{error.found}. The usual causes: a network or VAE that overflows --mixed_precision fp16 (bf16 does not),"
            " or learning rates that are too high."
        ) from error
    return to_uint8(videos[0])


def write_validation(folder: Path, clips: Sequence[tuple[str, np.ndarray | None]], fps: int) -> np.ndarray:
    """An mp4 for each prompt and its clip, and one picture of all of them, which is also returned, (H, W, 3) uint8.

    All is written, or nothing. Where there is no clip of a prompt its number stays free; one that comes again, with
    other noise, has its number in the picture.
    """
    shown: dict[str, list[np.ndarray]] = {}
    for number, (prompt, clip) in enumerate(clips):
        if clip is not None:
            label = prompt
            while label in shown:
                label += f" ({number})"
            shown[label] = [clip]
    picture = comparison(shown, [folder.name], frames_per_video=8)
    with room_for("the validation clips", folder), atomic_folder(folder) as temporary:
        for number, (_, clip) in enumerate(clips):
            if clip is not None:
                write_mp4(temporary / f"{number:02d}.mp4", clip, fps=fps)
        write_image(temporary / "overview.png", picture)
    return np.asarray(picture)
