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
from autoencoding import (
    NOISE,
    WORD_WEIGHT,
    WORDS,
    WithWords,
    initialise,
    like_a_sampler,
    normalise,
    picture_losses,
    word_loss,
    words,
)
from common import Frames, parser, save_half, to_pixels, train
from diffusers import AutoencoderKL
from torch import nn

LATENT_CHANNELS = 16


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
    said = {name: words(captions) for name, captions in data.captions.items()}
    torch.manual_seed(args.seed)
    if args.init:
        vae = AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32)
    else:
        vae = build()
        initialise(vae)
    model = WithWords(vae.to(memory_format=torch.channels_last), nn.Conv2d(LATENT_CHANNELS, WORDS, 1))
    if args.decoder_only:
        nn.ModuleList([vae.encoder, vae.quant_conv, model.read]).requires_grad_(False)

    def batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        picked = []
        for i in range(size):
            name = "videos" if i < size // 2 else domains[i % len(domains)]
            number = rng.integers(len(said[name]))
            frame = data.videos[number, rng.integers(16)] if name == "videos" else images[name][number]
            picked.append((frame, said[name][number]))
        frames, read = zip(*picked)
        return to_pixels(np.stack(frames)), torch.tensor(read)

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x, read = batch(rng, args.batch)
        if args.decoder_only:
            with torch.no_grad():
                z = like_a_sampler(model.vae.encode(x).latent_dist.mean, generator)
            return picture_losses(model.vae.decode(z).sample, x, decoder_only=True)
        z = normalise(model.vae.encode(x).latent_dist.mean)
        word = word_loss(model.read, z, read, generator)
        z = z + NOISE * torch.randn(z.shape, generator=generator)
        losses = picture_losses(model.vae.decode(z).sample, x, decoder_only=False)
        return losses | {"loss": losses["loss"] + WORD_WEIGHT * word, "word": word}

    vae = train("decoder" if args.decoder_only else "vae", model, loss_step, args, decay=0.995).vae
    if int(os.environ.get("RANK", 0)) == 0:
        if not args.decoder_only:
            fold_normalisation(vae, batch(np.random.default_rng([args.seed, 1 << 30]), 2048)[0])
        save_half(vae, args.output)


if __name__ == "__main__":
    main()
