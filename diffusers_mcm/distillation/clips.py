"""Clips that were encoded before: what is left of the autoencoder's work is to draw a sample."""

from __future__ import annotations

from typing import NamedTuple

import torch


class EncodedClips(NamedTuple):
    """The posterior of each clip, as `BaseModel.encode_posterior` gives it, in place of pixels."""

    mean: torch.Tensor  # (B, C, T, h, w) in the VAE's own scale; zeros where nobody looks at the clip
    deviation: torch.Tensor  # (B, C, T, h, w)
    num_frames: int  # of the clip in pixels, of which the latents may have fewer

    def to(self, device: torch.device) -> EncodedClips:
        """The clips on a device; from page-locked memory nobody waits for them."""
        mean, deviation = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        return EncodedClips(mean, deviation, self.num_frames)
