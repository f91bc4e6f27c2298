"""Trains the decoder of the shapes world to draw steady outlines from the latents that a few-step sampler leaves.

What such a sampler gets wrong of a latent is different in every frame, and the packaged decoder draws it: latents of
clean frames with noise of deviation 0.2 wobble as much as a sampled video. Here every latent is noisy, and what is
asked for beside `train_vae.py --decoder_only` is the outline as a whole. Latents, teacher and LoRA stay as they are.
"""

from pathlib import Path

import numpy as np
import torch
from common import Frames, parser, save_half, to_pixels, train
from diffusers import AutoencoderKL
from torch import nn
from train_vae import NOISE, STEEPNESS_WEIGHT, edges, emphasis, spread, steepness

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


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=2400, batch=16, lr=1e-3)
    p.add_argument("--init", required=True, help="the autoencoder whose decoder is trained")
    p.add_argument("--noise", type=float, default=0.5, help="largest deviation of the noise added to the latents")
    p.add_argument("--outline", type=float, default=0.3, help="weight of the outline")
    args = p.parse_args()
    data = Frames(args.data)
    domains = list(data.images)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32).to(memory_format=torch.channels_last)
    nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(False)

    def batch(rng: np.random.Generator) -> torch.Tensor:
        """Frames, half of them of the poor videos."""
        picked = []
        for i in range(args.batch):
            frames = data.videos if i < args.batch // 2 else data.images[domains[i % len(domains)]]
            frame = frames[rng.integers(len(frames))]
            picked.append(frame[rng.integers(len(frame))] if frame.ndim == 4 else frame)
        return to_pixels(np.stack(picked))

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = batch(rng)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        deviation = NOISE + args.noise * torch.rand(len(z), 1, 1, 1, generator=generator)
        reconstruction = vae.decode(z + deviation * torch.randn(z.shape, generator=generator)).sample
        error, weights = reconstruction - x, emphasis(x)
        pixel = (weights * error.abs()).mean()  # absolute errors: the median of what may be is sharper than the mean
        edge = sum((w * d.abs()).mean() for w, d in zip(spread(weights), edges(error)))
        steep = (steepness(reconstruction) / steepness(x) - 1).abs().mean()
        outline = outline_loss(reconstruction, x)
        loss = pixel + edge + STEEPNESS_WEIGHT * steep + args.outline * outline
        return {"loss": loss, "pixel": pixel, "edge": edge, "steepness": steep, "outline": outline}

    vae = train("steady_decoder", vae, loss_step, args, decay=0.995)
    save_half(vae, Path(args.output))


if __name__ == "__main__":
    main()
