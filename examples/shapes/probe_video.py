"""Says how far a video network puts damaged clips from whole ones: the more of the motion is missing, the farther.

The Fréchet distances of rendered clips of all held-out captions from other clips of the same captions, in units of the
features' mean variance among those. A network that is of use finds: truth < half of the clips, twice < half speed <
shuffled and frozen.
"""

import argparse

import numpy as np
import torch
from common import to_pixels
from transformers import VideoMAEModel

from diffusers_mcm.evaluation.distances import frechet_distance
from diffusers_mcm.features import pretrained
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.render import render_video

REFERENCE_SEED = 100  # the first of the reference's, none of those that are compared with it


def render(seeds: range, domain: str = "video") -> np.ndarray:
    """Clips of every held-out caption, uint8 (N, T, H, W, 3)."""
    return np.stack([render_video(caption, seed, domain) for caption in held_out_captions() for seed in seeds])


def damaged(clips: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The clips as they are, and with a flaw of each kind."""
    rng = np.random.default_rng(seed)
    noisy = clips + rng.normal(0, 8, clips.shape)
    return {
        "truth, other seeds": clips,
        "noise of deviation 8": np.clip(np.rint(noisy), 0, 255).astype(np.uint8),
        "half of the clips, twice": np.concatenate([clips[::2]] * 2),
        "reversed": clips[:, ::-1],
        "half speed": clips[:, np.arange(clips.shape[1]) // 2],
        "frames shuffled": np.stack([rng.permutation(clip) for clip in clips]),
        "first frame, frozen": np.repeat(clips[:, :1], clips.shape[1], axis=1),
    }


@torch.no_grad()
def features(network: VideoMAEModel, clips: np.ndarray) -> np.ndarray:
    """The mean token of each clip, float64 (N, C)."""
    parts = to_pixels(clips).split(40)
    return torch.cat([network(part).last_hidden_state.mean(1) for part in parts]).double().numpy()


def distances(network: VideoMAEModel, seeds: int, reference_seeds: int) -> dict[str, float]:
    """What the network says of `damaged`, and of clean clips, with so many seeds of each caption."""
    reference = features(network, render(range(REFERENCE_SEED, REFERENCE_SEED + reference_seeds)))
    sets = damaged(render(range(seeds))) | {"clean: sharp, no watermark": render(range(seeds), "clean")}
    unit = reference.var(0, ddof=1).mean()
    return {name: frechet_distance(features(network, clips), reference) / unit for name, clips in sets.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--network", default="mcm-shapes-video", help="packaged name, folder or Hub repository")
    p.add_argument("--seeds", type=int, default=4, help="clips of each caption")
    p.add_argument("--reference_seeds", type=int, default=16, help="clips of each caption in the reference")
    args = p.parse_args()
    network = pretrained(VideoMAEModel, args.network, ["videomae"], dtype=torch.float32).eval()
    for name, distance in distances(network, args.seeds, args.reference_seeds).items():
        print(f"| {name} | {distance:.2f} |")


if __name__ == "__main__":
    main()
