"""Where a distillation trajectory starts: its timestep, mixed starts (section 3.3), noising; the frames to decode."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..conditioning import Conditioning, select
from ..consistency import NoisePath, expand_like
from .teacher import Denoise

FRAME_DECODERS = ("exact", "image")  # ways to decode them; a base model may know but the first
VISITING_STEPS = (1, 2, 4, 8)  # the numbers of sampling steps that the paper reports


def visited_timesteps(path: NoisePath, num_solver_steps: int) -> torch.Tensor:
    """The grid, and once more what each of `VISITING_STEPS` visits of it, as our schedulers space their steps."""
    visiting = [steps for steps in VISITING_STEPS if steps <= num_solver_steps]
    visits = [path.visited_timesteps(steps, num_solver_steps) for steps in visiting]
    return torch.cat([path.solver_timesteps(num_solver_steps), *visits])


# From the path and the steps of the solver's grid to the timesteps among which one is drawn with equal chances.
TIMESTEPS: dict[str, Callable[[NoisePath, int], torch.Tensor]] = {
    "uniform": lambda path, num_solver_steps: path.solver_timesteps(num_solver_steps),
    "visited": visited_timesteps,
}


def noisy_start(path: NoisePath, x_end: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = α_t x_0 + σ_t ε, but pure noise at the terminal timestep (zero terminal SNR): sampling starts there.

    `x_end` is x_0, or of a phase that ends before what it ends in.
    """
    x_t = path.noise_again(x_end, noise, t)
    return torch.where(expand_like(t == path.terminal_timestep, x_end), noise.to(x_t.dtype), x_t)


@torch.no_grad()
def one_step_sample(denoise: Denoise, path: NoisePath, x_start: torch.Tensor, text: Conditioning) -> torch.Tensor:
    """x̂_0^θ = f_θ(x_T, T) with x_T pure noise (eq. 7): the student's own one-step sample, without gradients.

    Of a phase it leads from `x_start`, where that starts, to where it ends.
    """
    start = torch.full((len(x_start),), path.start_timestep, device=x_start.device)
    return path.consistency_function(denoise(x_start, start, text), x_start, start)


def mixed_start(
    denoise: Denoise,
    path: NoisePath,
    x0: torch.Tensor,
    start_noise: torch.Tensor,
    uniforms: torch.Tensor,
    lambda_real: float,
    text: Conditioning,
    in_step: bool = False,
) -> torch.Tensor:
    """Clean latents to start trajectories from: the real video with probability λ_real, else the student's own sample.

    One coin per sample has the expectation of eq. 9's weighted sum. The network runs on the samples that need it only.

    Latents of the real videos `x0` and pure noise `start_noise`, independent of the noise added later, are
    (B, C, T, H, W), `uniforms` are one draw from [0, 1) per sample, (B,), and λ_real is in [0, 1]. With `in_step` the
    network runs on one sample even where none needs it, as all processes must call a network that is split among them.

    Of a phase, both are what it ends in: the video with the noise that is left there, and the sample from where it
    starts, which in a later phase is the video with the noise that is there.
    """
    if not 0 <= lambda_real <= 1:
        raise ValueError(f"lambda_real must be between 0 and 1; got {lambda_real}.")
    if uniforms.shape != x0.shape[:1]:
        raise ValueError(f"There must be one uniform draw per sample, ({len(x0)},); got {tuple(uniforms.shape)}.")
    own = (uniforms >= lambda_real).nonzero().flatten().to(x0.device)
    x_end = path.at_end(x0, start_noise)
    if len(own) == 0:
        if in_step:
            one_step_sample(denoise, path, path.at_start(x0[:1], start_noise[:1]), select(text, own.new_zeros(1)))
        return x_end
    samples = one_step_sample(denoise, path, path.at_start(x0[own], start_noise[own]), select(text, own))
    return x_end.index_copy(0, own, samples.to(x0.dtype))


def pick_frames(num_frames: int, uniforms: torch.Tensor) -> torch.Tensor:
    """Sparse frames (section 3.1): one from each of l segments of the clip, as equal as they can be.

    `num_frames` are those of the clip, not of its latents, which may be fewer; `uniforms` are draws from [0, 1),
    (B, l). Returns frame indices, ascending, int64 (B, l).
    """
    if uniforms.ndim != 2 or not 1 <= uniforms.shape[1] <= num_frames:
        raise ValueError(
            f"uniforms must be (B, l) with l from 1 to the clip's {num_frames} frames; got {tuple(uniforms.shape)}."
        )
    l = uniforms.shape[1]  # noqa: E741 (the paper's symbol)
    edges = torch.arange(l + 1, device=uniforms.device) * num_frames // l
    offsets = (uniforms * edges.diff()).long()
    return torch.minimum(edges[:-1] + offsets, edges[1:] - 1)


def neighbours(frames: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The frame after each of these, and before the clip's last one; int64 of the same shape."""
    if num_frames < 2:
        raise ValueError(f"A frame of a clip of {num_frames} has no neighbour: expected 2 frames or more.")
    return torch.where(frames < num_frames - 1, frames + 1, frames - 1)
