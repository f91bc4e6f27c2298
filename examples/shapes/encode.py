"""Encodes the cached clips with the trained autoencoder: latents.npy, float16 (N, T, C, H, W), resumably.

Clips are encoded in blocks that hold every training caption equally often, a file each, so the teacher's
training can start before the last one is done.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Frames, to_pixels
from diffusers import AutoencoderKL

from diffusers_mcm.files import atomic_file


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--first", type=int, default=0, help="block to begin with")
    p.add_argument("--blocks", type=int, default=16, help="one after the last block")
    args = p.parse_args()
    data = Frames(args.data)
    vae = AutoencoderKL.from_pretrained(args.vae).to(memory_format=torch.channels_last)
    block = len(data.videos) // 16
    for number in range(args.first, args.blocks):
        target = args.data / f"latents_{number:02d}.npy"
        if target.exists():
            continue
        clips = data.videos[number * block : (number + 1) * block]
        with torch.no_grad():
            parts = [
                vae.encode(to_pixels(clips[i : i + 4]).flatten(0, 1)).latent_dist.mode().half().numpy()
                for i in range(0, len(clips), 4)
            ]
        latents = np.concatenate(parts).reshape(*clips.shape[:2], *parts[0].shape[1:])
        with atomic_file(target) as part, part.open("wb") as out:
            np.save(out, latents)
        print(target, flush=True)


if __name__ == "__main__":
    main()
