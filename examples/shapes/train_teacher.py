"""Trains the UNet3D teacher of the shapes world: v-prediction on latents of poor videos, frames first, then motion."""

import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from common import parser, save_half, train
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_mcm.shapes.captions import Caption, parse, training_captions
from diffusers_mcm.shapes.oracle import all_right, read_video

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
CAPTION_DROPOUT = 0.1
TIMESTEP_POWER = 1.5


def build(channels: int, text_width: int) -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock3D",) * 2,
        up_block_types=("CrossAttnUpBlock3D",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=16,
    )


class Latents:
    """Encoded clips (N, T, C, H, W); blocks that are written later are picked up as they appear."""

    def __init__(self, folder: Path):
        self.folder, self.blocks = folder, {}
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())["videos"]
        self.refresh()

    def refresh(self) -> None:
        for file in sorted(self.folder.glob("latents_*.npy")):
            number = int(file.stem.split("_")[1])
            if number not in self.blocks:
                self.blocks[number] = np.load(file)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one clip: (T, C, H, W)."""
        return next(iter(self.blocks.values())).shape[1:]

    def draw(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[str]]:
        numbers = sorted(self.blocks)
        length = len(self.blocks[numbers[0]])
        picked = [(numbers[rng.integers(len(numbers))], rng.integers(length)) for _ in range(size)]
        clips = np.stack([self.blocks[number][i] for number, i in picked])
        return clips.astype(np.float32), [self.captions[number * length + i] for number, i in picked]


def oracle_shares(frames: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The share of clips uint8 (N, T, H, W, 3) in which the oracle reads each attribute of the caption, and all."""
    pairs = [(read_video(clip), parse(word)) for clip, word in zip(frames, captions)]
    shares = {part: np.mean([getattr(r, part) == getattr(c, part) for r, c in pairs]) for part in Caption._fields}
    shares["all_right"] = np.mean([all_right(reading, caption) for reading, caption in pairs])
    return {part: round(float(share), 3) for part, share in shares.items()}


@torch.no_grad()
def sample(unet, scheduler, states, blank, generator, steps=16, guidance=2.0) -> torch.Tensor:
    """DDIM with guidance from noise: latents (B, C, T, H, W)."""
    x = torch.randn(len(states), unet.config.in_channels, 16, 4, 4, generator=generator)
    scheduler.set_timesteps(steps)
    text = torch.cat([states, blank.expand(len(states), -1, -1)])
    for t in scheduler.timesteps:
        cond, uncond = unet(torch.cat([x, x]), t, text).sample.chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


def main() -> None:
    p = parser(__doc__.splitlines()[0], steps=6000, batch=8, lr=1e-3)
    p.add_argument("--vae", type=Path, required=True)
    p.add_argument("--text", type=Path, required=True, help="folder written by train_clip.py")
    p.add_argument("--init", type=Path, help="go on from this teacher, with new rates, instead of from frames first")
    p.add_argument("--frame_steps", type=int, default=1500, help="of single frames, before the clips")
    p.add_argument("--frame_batch", type=int, default=64)
    p.add_argument("--watch_every", type=int, default=500)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.text)
    text_encoder = CLIPTextModel.from_pretrained(args.text, dtype=torch.float32).eval()
    scheduler = DDIMScheduler(**SCHEDULE)
    latents = Latents(args.data)

    @torch.no_grad()
    def encode(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids)[0]

    captions = [str(c) for c in training_captions()]
    states = dict(zip([*captions, ""], encode([*captions, ""])))

    def loss_of(unet: nn.Module, length: int, size: int):
        def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
            clips, words = latents.draw(rng, size)
            if length == 1:
                clips = clips[np.arange(size), rng.integers(clips.shape[1], size=size)][:, None]
            x = torch.from_numpy(clips).transpose(1, 2)  # (B, C, T, H, W)
            dropped = rng.random(size) < CAPTION_DROPOUT
            text = torch.stack([states["" if drop else word] for drop, word in zip(dropped, words)])
            # One draw from each of B equal ranges: less variance from batch to batch than independent ones. The power
            # favours small t: above 700 there is next to nothing to see, and a third of the batch would go there.
            u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
            t = (u**TIMESTEP_POWER * 1000).long()
            noise = torch.randn(x.shape, generator=generator)
            output = unet(scheduler.add_noise(x, noise, t), t, text).sample
            return {"loss": F.mse_loss(output, scheduler.get_velocity(x, noise, t))}

        return loss_step

    def watch(step: int, unet: nn.Module) -> dict:
        """What the oracle says of 16 training captions, DDIM 16."""
        latents.refresh()
        words = captions[:: len(captions) // 16][:16]
        text = torch.stack([states[word] for word in words])
        z = sample(unet, scheduler, text, states[""][None], torch.Generator().manual_seed(0))
        with torch.no_grad():
            frames = vae.decode(z.transpose(1, 2).flatten(0, 1)).sample
        frames = frames.clamp(-1, 1).add(1).mul(127.5).round().byte().unflatten(0, (len(words), -1))
        frames = frames.movedim(-3, -1).numpy()
        np.save(args.work / "teacher_watch.npy", frames)
        return oracle_shares(frames, words)

    if args.init:
        unet = UNet3DConditionModel.from_pretrained(args.init)
    else:
        unet = build(vae.config.latent_channels, text_encoder.config.hidden_size)
    unet.eval()  # its dropout would only slow so small a network
    if not args.init:
        frames_first = Namespace(**{**vars(args), "steps": args.frame_steps})
        unet = train("teacher_frames", unet, loss_of(unet, 1, args.frame_batch), frames_first, decay=0.998)
    latents.refresh()
    loss_step = loss_of(unet, 16, args.batch)
    unet = train("teacher", unet, loss_step, args, decay=0.998, watch=watch, watch_every=args.watch_every)
    if int(os.environ.get("RANK", 0)) == 0:
        save_half(unet, args.output)


if __name__ == "__main__":
    main()
