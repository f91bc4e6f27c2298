"""Trains the autoencoder of the shapes world: 64x64 pixels to 4x4 latents of 16 channels, each of unit scale.

It sees single frames of the poor videos and the good images, never a clean video. Colour and shape must be readable
from every latent cell by one linear map, through noise. Without that, what tells a circle from a square is so small a
part of the latents that a diffusion model decides it last and frame by frame, however long it is trained.
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

from diffusers_mcm.shapes.captions import COLOURS, SHAPES, parse

LATENT_CHANNELS = 16
NOISE = 0.05  # deviation of the posterior; it is fixed, since a learned one starts at 1 and drowns what is learned
WORD_NOISE = 0.7  # deviation of the noise through which colour and shape must still be read
WORD_WEIGHT = 0.03
STEEPNESS_WEIGHT = 0.1
SAMPLER_NOISE = 0.6  # largest deviation that is added to the latents of the decoder's own training


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


class WithWords(nn.Module):
    """An autoencoder and the linear map by which each latent cell must tell colour and shape."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        self.read = nn.Conv2d(vae.config.latent_channels, len(COLOURS) + len(SHAPES), 1)

    def word_loss(self, latents: torch.Tensor, words: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy of the words (B, 2: colour, shape) that are read from every cell of noisy latents."""
        noisy = latents + WORD_NOISE * torch.randn(latents.shape, generator=generator)
        colour, shape = self.read(noisy).split([len(COLOURS), len(SHAPES)], dim=1)
        words = words[:, :, None, None].expand(-1, -1, *latents.shape[2:])
        return F.cross_entropy(colour, words[:, 0]) + F.cross_entropy(shape, words[:, 1])


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def steepness(images: torch.Tensor) -> torch.Tensor:
    """Root of the mean squared difference of neighbours, (B,).

    Errors alone prefer a soft edge wherever its place is not quite known; this wants it as steep as it was.
    """
    return sum(d.square().flatten(1).mean(1) for d in edges(images)).add(1e-6).sqrt()


def spread(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each difference of neighbours the larger of their weights."""
    return (
        torch.maximum(weights[..., 1:], weights[..., :-1]),
        torch.maximum(weights[..., 1:, :], weights[..., :-1, :]),
    )


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
    p.add_argument("--init", type=Path, help="go on from this autoencoder instead of from chance")
    p.add_argument("--decoder_only", action="store_true", help="leave the latents of --init as they are")
    args = p.parse_args()
    if args.decoder_only and not args.init:
        p.error("--decoder_only needs the autoencoder whose decoder is trained: give --init")
    data = Frames(args.data)
    images, domains = data.images, list(data.images)
    words = {
        name: [(list(COLOURS).index(c.colour), SHAPES.index(c.shape)) for c in map(parse, captions)]
        for name, captions in data.captions.items()
    }
    torch.manual_seed(args.seed)
    if args.init:
        vae = AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32)
    else:
        vae = build()
        initialise(vae)
    model = WithWords(vae.to(memory_format=torch.channels_last))
    if args.decoder_only:
        nn.ModuleList([vae.encoder, vae.quant_conv, model.read]).requires_grad_(False)

    def batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        picked = []
        for i in range(size):
            name = "videos" if i < size // 2 else domains[i % len(domains)]
            number = rng.integers(len(words[name]))
            frame = data.videos[number, rng.integers(16)] if name == "videos" else images[name][number]
            picked.append((frame, words[name][number]))
        frames, read = zip(*picked)
        return to_pixels(np.stack(frames)), torch.tensor(read)

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x, read = batch(rng, args.batch)
        losses, deviation = {}, NOISE
        if args.decoder_only:
            with torch.no_grad():
                z = model.vae.encode(x).latent_dist.mean
            # half of the latents as wrong as a sampler's: what they say most plainly is to be drawn
            extent = torch.rand(len(z), 1, 1, 1, generator=generator)
            deviation += SAMPLER_NOISE * (2 * extent - 1).clamp(min=0)
        else:
            z = normalise(model.vae.encode(x).latent_dist.mean)
            losses["word"] = model.word_loss(z, read, generator)
        reconstruction = model.vae.decode(z + deviation * torch.randn(z.shape, generator=generator)).sample
        error = reconstruction - x
        weights = emphasis(x)
        if args.decoder_only:  # absolute errors: the median of what may be is sharper than the mean
            pixel = (weights * error.abs()).mean()
            edge = sum((w * d.abs()).mean() for w, d in zip(spread(weights), edges(error)))
            losses["steepness"] = (steepness(reconstruction) / steepness(x) - 1).abs().mean()
        else:
            pixel = (weights * (2 * error.square() + 0.5 * error.abs())).mean()
            edge = sum(d.abs().mean() for d in edges(error))
        extra = WORD_WEIGHT * losses.get("word", 0) + STEEPNESS_WEIGHT * losses.get("steepness", 0)
        return losses | {"loss": pixel + edge + extra, "pixel": pixel, "edge": edge, "error": error.abs().mean()}

    vae = train("decoder" if args.decoder_only else "vae", model, loss_step, args, decay=0.995).vae
    if int(os.environ.get("RANK", 0)) == 0:
        if not args.decoder_only:
            fold_normalisation(vae, batch(np.random.default_rng([args.seed, 1 << 30]), 2048)[0])
        save_half(vae, args.output)


if __name__ == "__main__":
    main()
