"""Motion representations: what of the latents the consistency loss compares (section 3.2, table 5).

Each is a module from latents (B, C, T, H, W) to a tensor with the batch first. Only `learnable` has parameters; it is
trained with the student, its target is an exponential moving average, and sampling does without it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class LatentDifference(nn.Module):
    """Differences of consecutive frames, (B, C, T-1, H, W)."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        before, after = _consecutive_frames(latents, "diff")
        return after - before


class LatentCorrelation(nn.Module):
    """The cost volume of consecutive frames, (B, T-1, H, W, H, W): ⟨x_{f}(p), x_{f+1}(q)⟩ / √C for all p and q."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        before, after = _consecutive_frames(latents, "corr")
        return torch.einsum("bctij,bctkl->btijkl", before, after) / latents.shape[1] ** 0.5


class FrequencyBand(nn.Module):
    """The part of the latents that a 3-D Butterworth filter lets pass, (B, C, T, H, W).

    Frequencies are in units of the Nyquist frequency. `band` is "low" or "high"; the two add up to the latents.
    """

    def __init__(self, band: str, order: int = 4, spatial_stop: float = 0.25, temporal_stop: float = 0.25):
        super().__init__()
        if band not in ("low", "high"):
            raise ValueError(f"Unknown band {band!r}; valid values are ['high', 'low'].")
        if order < 1 or spatial_stop <= 0 or temporal_stop <= 0:
            raise ValueError(
                "The filter's order must be at least 1 and its stop frequencies positive; got order"
                f" {order}, spatial_stop {spatial_stop}, temporal_stop {temporal_stop}."
            )
        self.band, self.order = band, order
        self.spatial_stop, self.temporal_stop = spatial_stop, temporal_stop

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        working = latents.to(torch.promote_types(latents.dtype, torch.float32))
        size, axes = latents.shape[-3:], (-3, -2, -1)
        response = self.response(size, latents.device).to(working.dtype)
        filtered = torch.fft.irfftn(torch.fft.rfftn(working, dim=axes) * response, s=size, dim=axes)
        return filtered.to(latents.dtype)

    def response(self, size: tuple[int, int, int], device: torch.device | None = None) -> torch.Tensor:
        """The gain at each frequency of a real transform, (T, H, W // 2 + 1): 1 / (1 + d^2n) for the low band."""
        frames, height, width = size
        f_t = 2 * torch.fft.fftfreq(frames, device=device) / self.temporal_stop
        f_h = 2 * torch.fft.fftfreq(height, device=device) / self.spatial_stop
        f_w = 2 * torch.fft.rfftfreq(width, device=device) / self.spatial_stop
        d_squared = f_t[:, None, None] ** 2 + f_h[None, :, None] ** 2 + f_w[None, None, :] ** 2
        low = 1 / (1 + d_squared**self.order)
        return low if self.band == "low" else 1 - low


class LearnableMotion(nn.Module):
    """The learnable head (fig. 4), per frame: x + conv(SiLU(GroupNorm(conv(SiLU(x))))), the identity at first."""

    GROUPS = 32

    def __init__(self, channels: int, hidden: int = 64):
        super().__init__()
        if hidden < 1 or hidden % self.GROUPS:
            raise ValueError(f"hidden must be a multiple of the {self.GROUPS} normalisation groups; got {hidden}.")
        self.conv_in = nn.Conv2d(channels, hidden, kernel_size=1)
        self.norm = nn.GroupNorm(self.GROUPS, hidden)
        self.conv_out = nn.Conv2d(hidden, channels, kernel_size=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = latents.shape
        if channels != self.conv_in.in_channels:
            raise ValueError(f"The motion head is for {self.conv_in.in_channels} channels; got {channels}.")
        x = latents.transpose(1, 2).flatten(0, 1)  # (B*T, C, H, W)
        x = nn.functional.silu(self.norm(self.conv_in(nn.functional.silu(x))))
        x = self.conv_out(x).unflatten(0, (batch, frames)).transpose(1, 2)
        return latents + x


MOTION_REPRESENTATIONS: dict[str, Callable[[int], nn.Module]] = {
    "raw": lambda channels: nn.Identity(),  # plain consistency distillation
    "diff": lambda channels: LatentDifference(),
    "corr": lambda channels: LatentCorrelation(),
    "low": lambda channels: FrequencyBand("low"),
    "high": lambda channels: FrequencyBand("high"),
    "learnable": LearnableMotion,
}


def build_motion(name: str, channels: int) -> nn.Module:
    """The motion representation called `name`, for latents of `channels` channels."""
    if name not in MOTION_REPRESENTATIONS:
        raise ValueError(f"Unknown motion representation {name!r}; valid values are {sorted(MOTION_REPRESENTATIONS)}.")
    return MOTION_REPRESENTATIONS[name](channels)


@torch.no_grad()
def update_ema(target: nn.Module, source: nn.Module, decay: float = 0.95) -> None:
    """target ← decay · target + (1 − decay) · source, for every parameter; buffers are copied."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1; got {decay}.")
    shapes = [[(name, p.shape) for name, p in module.named_parameters()] for module in (target, source)]
    if shapes[0] != shapes[1]:
        raise ValueError("The moving average needs two modules with the same parameters.")
    for parameter, source_parameter in zip(target.parameters(), source.parameters(), strict=True):
        parameter.lerp_(source_parameter.to(parameter), 1 - decay)
    for buffer, source_buffer in zip(target.buffers(), source.buffers(), strict=True):
        buffer.copy_(source_buffer)


def _consecutive_frames(latents: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if latents.shape[2] < 2:
        raise ValueError(f"Motion representation {name!r} needs at least 2 frames; got {latents.shape[2]}.")
    return latents[:, :, :-1], latents[:, :, 1:]
