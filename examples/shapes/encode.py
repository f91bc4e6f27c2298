"""Encodes the cached clips with a trained autoencoder: latents of unit scale, float16 (N, T, C, H, W), resumably.

Clips are encoded in blocks that hold every training caption equally often, a file each, so the teacher's
training can start before the last one is done. The autoencoder may be train_vae.py's or train_wan_vae.py's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Frames, to_pixels
from diffusers import AutoencoderKL, AutoencoderKLWan

from diffusers_mcm.base_models.wan import Wan
from diffusers_mcm.files import atomic_file


def encoder(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes latents (B, T, C, h, w) of pixels (B, F, 3, H, W)."""
    if json.loads((folder / "config.json").read_text())["_class_name"] == "AutoencoderKLWan":
        causal = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
        return lambda pixels: Wan().encode_video(causal, pixels.transpose(1, 2)).transpose(1, 2)
    vae = AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)
    return lambda pixels: vae.encode(pixels.flatten(0, 1)).latent_dist.mode().unflatten(0, pixels.shape[:2])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--first", type=int, default=0, help="block to begin with")
    p.add_argument("--blocks", type=int, default=16, help="one after the last block")
    args = p.parse_args()
    data = Frames(args.data)
    encode = encoder(args.vae)
    block = len(data.videos) // 16
    for number in range(args.first, args.blocks):
        target = args.data / f"latents_{number:02d}.npy"
        if target.exists():
            continue
        clips = data.videos[number * block : (number + 1) * block]
        with torch.no_grad():
            parts = [encode(to_pixels(clips[i : i + 4])).half().numpy() for i in range(0, len(clips), 4)]
        with atomic_file(target) as part, part.open("wb") as out:
            np.save(out, np.concatenate(parts))
        print(target, flush=True)


if __name__ == "__main__":
    main()
