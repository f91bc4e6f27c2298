"""Trains the autoencoder of the shapes world: 64x64 pixels to 4x4 latents of 16 channels, each of unit scale.

It sees single frames of the poor videos and the good images, never a clean video.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from common import Frames, parser, save_half, to_pixels, train
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
NOISE = 0.05  # deviation of the posterior; it is fixed, since a learned one starts at 1 and drowns what is learned


def initialise(vae: AutoencoderKL) -> None:
    """Convolutions that keep the variance, no biases, residual branches that start at zero.

    torch's own initialisation shrinks the signal by a third a layer while its biases stay: through so narrow and
    deep a network the picture drowns in constants and even the background takes hundreds of steps.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)


def build() -> AutoencoderKL:
    channels = (16, 32, 48, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def emphasis(images: torch.Tensor) -> torch.Tensor:
    """Weights (B, 1, H, W) that count what differs from the background five times: it is a tenth of the pixels."""
    background = images.flatten(2).median(dim=2).values[..., None, None]
    return 1 + 4 * ((images - background).abs().amax(1, keepdim=True) > 0.1)


def normalise(latents: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit scale by channel: a scale that is free to drift makes the first thousand steps unstable."""
    return F.batch_norm(latents, None, None, training=True)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    """Give the encoder's 1x1 convolution the normalisation that training applied to its result."""
    mean = torch.cat([vae.quant_conv(vae.encoder(part)) for part in frames.split(64)]).chunk(2, dim=1)[0]
    centre, deviation = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    channels = len(centre)
    vae.quant_conv.weight[:channels] /= deviation[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - centre) / deviation
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(NOISE)


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=1800, batch=24, lr=1e-3)
    p.add_argument("--decoder_of", type=Path, help="train only the decoder of this autoencoder; its latents stay")
    args = p.parse_args()
    data = Frames(args.data)
    images, domains = data.images, list(data.images)
    if args.decoder_of:
        vae = AutoencoderKL.from_pretrained(args.decoder_of).to(memory_format=torch.channels_last)
        nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(False)
    else:
        torch.manual_seed(args.seed)
        vae = build().to(memory_format=torch.channels_last)
        initialise(vae)

    def batch(rng: np.random.Generator, size: int) -> torch.Tensor:
        picked = [data.videos[rng.integers(len(data.videos)), rng.integers(16)] for _ in range(size // 2)]
        for i in range(size - len(picked)):
            images_of_domain = images[domains[i % len(domains)]]
            picked.append(images_of_domain[rng.integers(len(images_of_domain))])
        return to_pixels(np.stack(picked))

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = batch(rng, args.batch)
        with torch.set_grad_enabled(not args.decoder_of):
            z = vae.encode(x).latent_dist.mean
            z = z if args.decoder_of else normalise(z)
        reconstruction = vae.decode(z + NOISE * torch.randn(z.shape, generator=generator)).sample
        error = reconstruction - x
        pixel = (emphasis(x) * (2 * error.square() + 0.5 * error.abs())).mean()
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(reconstruction), edges(x)))
        return {"loss": pixel + edge, "pixel": pixel, "edge": edge, "error": error.abs().mean()}

    vae = train("decoder" if args.decoder_of else "vae", vae, loss_step, args, decay=0.995)
    if int(os.environ.get("RANK", 0)) == 0:
        if not args.decoder_of:
            fold_normalisation(vae, batch(np.random.default_rng([args.seed, 1 << 30]), 2048))
        save_half(vae, args.output)


if __name__ == "__main__":
    main()
