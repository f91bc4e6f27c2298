"""Trains the decoder of the shapes world to draw steady outlines from the latents that a few-step sampler leaves.

What such a sampler gets wrong of a latent is different in every frame, and the decoder of `train_vae.py` draws it:
latents of clean frames with noise of deviation 0.2 wobble as much as a sampled video. Here every latent is noisy, and
what is asked for beside `train_vae.py --decoder_only` is the outline as a whole. Latents, teacher and LoRA stay what
they are. The decoder's middle, where a frame is seen as a whole, is trained first, by itself.
"""

import argparse
import copy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from autoencoding import NOISE, STEEPNESS_WEIGHT, edges, emphasis, spread, steepness
from common import Frames, parser, save_half, to_pixels, train
from diffusers import AutoencoderKL
from torch import nn

from diffusers_mcm.shapes.steadiness import MIN_DISTANCE

SOFTNESS = 0.05  # of an outline: colour distance over which a pixel comes to count as the shape's


def soft_masks(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """How much each pixel (B, H, W) is the shape's, as `steadiness` tells it; images (B, 3, H, W) are in [-1, 1]."""
    distance = ((images - background) / 2).square().sum(1).add(1e-6).sqrt()
    return ((distance - MIN_DISTANCE) / SOFTNESS).sigmoid()


def outline_loss(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 − intersection over union of the shapes, mean over the batch."""
    background = truth.flatten(2).median(dim=2).values[..., None, None]
    one, other = soft_masks(images, background), soft_masks(truth, background)
    together, either = torch.minimum(one, other).sum((1, 2)), torch.maximum(one, other).sum((1, 2))
    return (1 - together / either).mean()


def middle(vae: AutoencoderKL) -> nn.ModuleList:
    """The decoder's part that works at the size of the latents, up to its first enlargement."""
    decoder = vae.decoder
    return nn.ModuleList([vae.post_quant_conv, decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]])


def through(part: nn.ModuleList, latents: torch.Tensor) -> torch.Tensor:
    """What the middle makes of latents (B, C, h, w)."""
    for module in part:
        latents = module(latents)
    return latents


def noisy(latents: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """Latents with noise, of a deviation drawn for each between that of the posterior and `most` more."""
    deviation = NOISE + most * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + deviation * torch.randn(latents.shape, generator=generator)


def train_middle(vae: AutoencoderKL, data: Frames, args: argparse.Namespace) -> None:
    """Teach the middle to make of noisy latents what it made of clean ones.

    It sees no pixel, and so a frame costs a twentieth of what it does through the whole decoder.
    """
    part, before = middle(vae), copy.deepcopy(middle(vae)).requires_grad_(False)

    @cache
    def latents() -> torch.Tensor:
        rng = np.random.default_rng([args.seed, 1 << 30])
        with torch.no_grad():
            parts = [vae.encode(frames(data, rng, 64)).latent_dist.mean for _ in range(args.pool // 64)]
        return torch.cat(parts)

    @cache
    def scale() -> torch.Tensor:
        with torch.no_grad():
            return through(before, latents()[:256]).std((0, 2, 3), keepdim=True)

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        z = latents()[rng.integers(len(latents()), size=64)]
        with torch.no_grad():
            wanted = through(before, z)
        error = (through(part, noisy(z, args.noise, generator)) - wanted) / scale()
        return {"loss": (error.square() + 0.01).sqrt().mean()}

    settings = argparse.Namespace(**vars(args) | {"steps": args.middle_steps})
    part.load_state_dict(train("steady_middle", part, loss_step, settings, decay=0.995).state_dict())


def frames(data: Frames, rng: np.random.Generator, count: int) -> torch.Tensor:
    """So many frames, half of them of the poor videos: (count, 3, H, W) in [-1, 1]."""
    domains, picked = list(data.images), []
    for i in range(count):
        media = data.videos if i < count // 2 else data.images[domains[i % len(domains)]]
        one = media[rng.integers(len(media))]
        picked.append(one[rng.integers(len(one))] if one.ndim == 4 else one)
    return to_pixels(np.stack(picked))


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=6000, batch=16, lr=1e-3)
    p.add_argument("--init", required=True, help="the autoencoder whose decoder is trained")
    p.add_argument("--noise", type=float, default=0.5, help="largest deviation of the noise added to the latents")
    p.add_argument("--outline", type=float, default=0.3, help="weight of the outline")
    p.add_argument("--middle_steps", type=int, default=12000, help="steps of its middle alone, which come first")
    p.add_argument("--pool", type=int, default=8192, help="frames whose latents those steps draw from")
    args = p.parse_args()
    data = Frames(args.data)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32).to(memory_format=torch.channels_last)
    nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(False)
    train_middle(vae, data, args)

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = frames(data, rng, args.batch)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        reconstruction = vae.decode(noisy(z, args.noise, generator)).sample
        error, weights = reconstruction - x, emphasis(x)
        pixel = (weights * error.abs()).mean()  # absolute errors: the median of what may be is sharper than the mean
        edge = sum((w * d.abs()).mean() for w, d in zip(spread(weights), edges(error)))
        steep = (steepness(reconstruction) / steepness(x) - 1).abs().mean()
        outline = outline_loss(reconstruction, x)
        loss = pixel + edge + STEEPNESS_WEIGHT * steep + args.outline * outline
        return {"loss": loss, "pixel": pixel, "edge": edge, "steepness": steep, "outline": outline}

    save_half(train("steady_decoder", vae, loss_step, args, decay=0.995), Path(args.output))


if __name__ == "__main__":
    main()
