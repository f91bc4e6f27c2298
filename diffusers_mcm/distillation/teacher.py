"""The teacher: the base model with classifier-free guidance, taken one DDIM step along its path (eq. 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..conditioning import Conditioning, concatenate
from ..consistency import NoisePath, expand_like

Denoise = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


@torch.no_grad()
def guided_prediction(
    denoise: Denoise,
    path: NoisePath,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Conditioning,
    negative_text: Conditioning,
    w: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂_0 and ε̂, each guided as cond + w (cond − uncond), from one call of `denoise` on 2B latents.

    `denoise(latents, timesteps (B,), text)` gives the network's output in the latents' shape. Latents `x_t` are
    (B, C, T, H, W), timesteps (B,); the values of both encodings have the batch first and the same shapes, and
    guidance leads away from `negative_text` (usually the empty prompt). Its strength w is a number or (B,): 0 is the
    conditional prediction alone, and the guidance scale of diffusers' pipelines is w + 1. The results are float32.
    """
    w = torch.as_tensor(w, dtype=torch.float32, device=x_t.device)
    if w.ndim > 1 or w.ndim == 1 and len(w) != len(x_t):
        raise ValueError(f"The guidance strength w must be a number or of shape ({len(x_t)},); got {tuple(w.shape)}.")
    t_both, x_both = torch.cat([t, t]), torch.cat([x_t, x_t])
    output = denoise(x_both, t_both, concatenate(negative_text, text))
    x_both = x_both.to(torch.promote_types(x_both.dtype, torch.float32))

    def guide(both: torch.Tensor) -> torch.Tensor:
        unconditional, conditional = both.chunk(2)
        return conditional + expand_like(w, x_t) * (conditional - unconditional)

    return guide(path.predict_x0(output, x_both, t_both)), guide(path.predict_noise(output, x_both, t_both))


@torch.no_grad()
def teacher_step(
    denoise: Denoise,
    path: NoisePath,
    x_t: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    text: Conditioning,
    negative_text: Conditioning,
    w: torch.Tensor | float,
) -> torch.Tensor:
    """x̂_{t_prev} = x_t − s Φ(x_t, t; φ) (eq. 2): one guided DDIM step from `t` to `t_prev`, in the type of `x_t`."""
    x0, noise = guided_prediction(denoise, path, x_t, t, text, negative_text, w)
    return path.step(x0, noise, t_prev).to(x_t.dtype)
