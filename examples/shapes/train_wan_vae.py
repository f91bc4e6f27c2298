"""Trains the causal video autoencoder of the miniature Wan: 17 frames of 64x64 pixels to 5x8x8 latents of 16 channels.

Single pictures come first, then clips, then the decoder alone. The clips are the poor videos, and stills of the good
images that drift by whole pixels: no clean video is rendered for it. Colour and shape must be readable from every
latent cell, as `train_vae.py` says.
"""

import math
import os
from argparse import Namespace

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
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import nn

from diffusers_mcm.base_models.wan import latent_statistics
from diffusers_mcm.shapes.captions import spaced, training_captions
from diffusers_mcm.shapes.oracle import all_right, read_video
from diffusers_mcm.shapes.render import render_video

LATENT_CHANNELS = 16
FASTEST = 2  # pixels that a still drifts from frame to frame, at most


def build() -> AutoencoderKLWan:
    """As Wan 2.2's, it works on patches of 2x2 pixels, which is a quarter of the work."""
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=20,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )
    initialise(vae)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d):  # the past, which single pictures do not have, is learnt of clips
            module.weight.data[:, :, :-1] = 0
        if name.endswith("time_conv"):  # at first each frame is what the last one that is read was
            frames, width = module.out_channels // module.in_channels, module.in_channels
            nn.init.zeros_(module.weight)
            module.weight.data[:, :, -1, 0, 0] = torch.eye(width).repeat(frames, 1)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):  # a fifth less time
            image = isinstance(module, nn.Conv2d)
            module.to(memory_format=torch.channels_last if image else torch.channels_last_3d)
    return vae


def drift(image: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A still (H, W, 3) that moves by whole pixels, so that it stays as sharp as it is: (length, H, W, 3).

    What comes in at the border repeats it.
    """
    speed = rng.integers(-FASTEST, FASTEST + 1, size=2) * (np.arange(2) == rng.integers(2))
    shift = (np.arange(length) - length // 2)[:, None] * speed
    rows, columns = ((np.arange(side) + by[:, None]).clip(0, side - 1) for side, by in zip(image.shape, shift.T))
    return image[rows[:, :, None], columns[:, None]]


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp, through which no gradient would come: (B, C, T, h, w) to (B, 3, F, H, W)."""
    left = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    parts = vae.post_quant_conv(latents).split(1, dim=2)
    frames = [vae.decoder(part, feat_cache=left, feat_idx=[0], first_chunk=part is parts[0]) for part in parts]
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


class Clips:
    """Batches of clips: half of them poor videos, half drifting stills of the good images."""

    def __init__(self, data: Frames):
        self.data, self.domains = data, list(data.images)
        self.said = {name: words(captions) for name, captions in data.captions.items()}

    def draw(self, rng: np.random.Generator, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (size, 3, length, H, W) in [-1, 1], and the numbers of colour and shape (size, 2)."""
        clips, said = [], []
        for _ in range(size):
            # a batch may hold three clips, so that whose turn it is may not depend on the place alone
            name = "videos" if rng.random() < 0.5 else self.domains[rng.integers(len(self.domains))]
            number = rng.integers(len(self.said[name]))
            if name == "videos":
                start = rng.integers(self.data.videos.shape[1] - length + 1)
                clips.append(self.data.videos[number, start : start + length])
            else:
                clips.append(drift(self.data.images[name][number], length, rng))
            said.append(self.said[name][number])
        return to_pixels(np.stack(clips)).transpose(1, 2), torch.tensor(said)


@torch.no_grad()
def moments(vae: AutoencoderKLWan, clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of clips, for each channel."""
    latents = torch.cat([vae.encode(clip).latent_dist.mean.transpose(0, 1).flatten(1) for clip in clips], dim=1)
    return latents.mean(1), latents.std(1)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKLWan, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Give the decoder's 1x1x1 convolution the normalisation that training applied to the latents, and the posterior
    its deviation: the latents keep the scale that the encoder found, as Wan's do."""
    convolution, channels = vae.post_quant_conv, len(mean)
    convolution.weight /= deviation.view(1, -1, 1, 1, 1)
    convolution.bias -= convolution.weight.flatten(1) @ mean
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * (NOISE * deviation).log()


@torch.no_grad()
def watch(vae: AutoencoderKLWan, folded: bool, count: int) -> dict:
    """How well whole clips come back, and whether they still read as what they are; clean ones are seen only here."""
    record, captions = {}, spaced(training_captions(), count)
    truth = {
        domain: [render_video(c, 10**9 + i, domain, num_frames=17) for i, c in enumerate(captions)]
        for domain in ("video", "clean")
    }
    x = to_pixels(np.stack([clip for clips in truth.values() for clip in clips])).transpose(1, 2)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(4)])
    z = z if folded else normalise(z)
    back = torch.cat([decode(vae, part) for part in z.split(4)]).clamp(-1, 1)
    errors = (back - x).square().unflatten(0, (2, -1)).flatten(1).mean(1) / 4
    frames = back.add(1).mul(127.5).round().byte().permute(0, 2, 3, 4, 1).unflatten(0, (2, -1)).numpy()
    for (domain, clips), error, found in zip(truth.items(), errors, frames):
        readings = [read_video(clip) for clip in found]
        sharp = np.nanmean([r.sharpness for r in readings]) / np.nanmean([read_video(c).sharpness for c in clips])
        record[f"{domain}_psnr"] = round(-10 * math.log10(error), 2)
        record[f"{domain}_right"] = round(float(np.mean([all_right(r, c) for r, c in zip(readings, captions)])), 3)
        record[f"{domain}_sharpness"] = round(float(sharp), 3)
    return record


def loss_of(model: WithWords, clips: Clips, frames: int, lengths: tuple[int, ...], decoder_only: bool):
    """The loss of a step, on so many `frames` in clips of one of the `lengths`."""

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        length = int(rng.choice(lengths))
        x, said = clips.draw(rng, max(2, frames // length), length)
        if decoder_only:
            with torch.no_grad():
                z = model.vae.encode(x).latent_dist.mean
                mean, deviation = latent_statistics(model.vae, z)
                z = like_a_sampler((z - mean) / deviation, generator) * deviation + mean
        else:
            z = normalise(model.vae.encode(x).latent_dist.mean)
            word = word_loss(model.read, z, said, generator)
            z = z + NOISE * torch.randn(z.shape, generator=generator)
        pictures = (y.transpose(1, 2).flatten(0, 1) for y in (decode(model.vae, z), x))
        losses = picture_losses(*pictures, decoder_only=decoder_only)
        return losses if decoder_only else losses | {"loss": losses["loss"] + WORD_WEIGHT * word, "word": word}

    return loss_step


def finish_encoder(model: WithWords, clips: Clips, seed: int, size: int) -> None:
    """Fold the normalisation of training in, say in the configuration what scale latents of poor videos have, and
    freeze the encoder."""
    rng, poor = np.random.default_rng([seed, 1 << 30]), clips.data.videos
    fold_normalisation(model.vae, *moments(model.vae, [clips.draw(rng, size, 9)[0] for _ in range(32)]))
    some = poor[:: max(1, len(poor) // 256)]
    mean, deviation = moments(model.vae, [to_pixels(clip)[None].transpose(1, 2) for clip in some])
    model.vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    nn.ModuleList([model.vae.encoder, model.vae.quant_conv, model.read]).requires_grad_(False)


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=2900, batch=51, lr=1e-3)
    p.add_argument("--picture_steps", type=int, default=300, help="of single pictures, before the clips")
    p.add_argument("--decoder_steps", type=int, default=6000, help="of the decoder alone, after them")
    p.add_argument("--watch_every", type=int, default=200)
    p.add_argument("--watched", type=int, default=12, help="rendered clips of each domain that are looked at")
    args = p.parse_args()
    clips = Clips(Frames(args.data))
    torch.manual_seed(args.seed)
    model = WithWords(build(), nn.Conv3d(LATENT_CHANNELS, WORDS, 1))

    def stage(name: str, model: WithWords, steps: int, lengths: tuple[int, ...], decoder_only: bool = False):
        stage_args = Namespace(**{**vars(args), "steps": steps})
        loss_step = loss_of(model, clips, args.batch, lengths, decoder_only)
        if max(lengths) == 1:  # so few steps that an average would hold much of where they began
            return train(name, model, loss_step, stage_args)
        seen = {"watch": lambda _, model: watch(model.vae, decoder_only, args.watched)}
        return train(name, model, loss_step, stage_args, decay=0.995, watch_every=args.watch_every, **seen)

    model = stage("wan_vae_pictures", model, args.picture_steps, (1,))
    model = stage("wan_vae", model, args.steps, (1, 5, 9, 9))
    finish_encoder(model, clips, args.seed, max(2, args.batch // 9))
    model = stage("wan_vae_decoder", model, args.decoder_steps, (5, 9, 17), decoder_only=True)
    if int(os.environ.get("RANK", 0)) == 0:
        save_half(model.vae, args.output)


if __name__ == "__main__":
    main()
