"""Trains the DINOv2-architecture feature network of the shapes world, for the discriminator to look through.

Masked patches are filled in, on frames of the poor videos and on the good images, so that the patch tokens know edges,
texture and watermark. And what is shown is told from every single patch token of the later blocks that the
discriminator looks at: its logits are per patch, and it can hold against a video only what a patch token says.
"""

import numpy as np
import torch
from common import Frames, parser, save_half, to_pixels, train
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, SHAPES, parse

WIDTH, PATCH, SIZE = 64, 8, 64
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
MASKED = 0.4
ATTRIBUTES = ("colour", "shape", "background", "domain")
TOLD_WEIGHT = 0.3
BLOCKS = (5, 8, 11)  # of those that the discriminator reads; the earliest stays with what is local


def build() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=12,
            num_attention_heads=4,
            mlp_ratio=3,
            image_size=SIZE,
            patch_size=PATCH,
            use_mask_token=True,
        )
    )


class Pretext(nn.Module):
    """The network with the heads that only its training needs."""

    def __init__(self, network: Dinov2Model):
        super().__init__()
        self.network = network
        self.pixels = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.early_pixels = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        counts = (len(COLOURS), len(SHAPES), len(BACKGROUNDS), 4)
        self.attributes = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, n) for n in counts) for _ in BLOCKS)


def main() -> None:
    args = parser(__doc__.splitlines()[0], steps=2400, batch=48, lr=1.5e-3).parse_args()
    data = Frames(args.data)
    images = data.images
    sources = ["videos", *images]
    model = Pretext(build())
    vocabulary = [list(words) for words in (COLOURS, SHAPES, BACKGROUNDS)]

    def loss_step(rng: np.random.Generator, generator: torch.Generator) -> dict[str, torch.Tensor]:
        frames, labels = [], []
        for i in range(args.batch):
            source = i % len(sources)
            captions = data.captions[sources[source]]
            index = rng.integers(len(captions))
            frames.append(data.videos[index, rng.integers(16)] if source == 0 else images[sources[source]][index])
            caption = parse(captions[index])
            words = (caption.colour, caption.shape, caption.background)
            labels.append([*(v.index(w) for v, w in zip(vocabulary, words)), source])
        x = (to_pixels(np.stack(frames)) * 0.5 + 0.5 - MEAN[:, None, None]) / DEVIATION[:, None, None]
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)  # (B, P, 3 * PATCH * PATCH)
        mask = torch.rand(patches.shape[:2], generator=generator) < MASKED
        mask &= (torch.arange(args.batch) // len(sources) % 2 == 0)[:, None]  # the discriminator sees whole images
        out = model.network(x, bool_masked_pos=mask, output_hidden_states=True)
        tokens = out.last_hidden_state
        fill = F.smooth_l1_loss(model.pixels(tokens[:, 1:]), patches)
        early = model.network.layernorm(out.hidden_states[3])[:, 1:]
        kept = ~mask
        keep = F.smooth_l1_loss(model.early_pixels(early)[kept], patches[kept])
        target, patch_count = torch.tensor(labels), tokens.shape[1] - 1
        told = dict.fromkeys(ATTRIBUTES, 0.0)
        for block, heads in zip(BLOCKS, model.attributes):
            seen = model.network.layernorm(out.hidden_states[block + 1])[:, 1:].flatten(0, 1)  # (B * P, C)
            for i, (name, head) in enumerate(zip(ATTRIBUTES, heads)):
                loss = F.cross_entropy(head(seen), target[:, i].repeat_interleave(patch_count))
                told[name] = told[name] + loss / len(BLOCKS)
        return {"loss": fill + keep + TOLD_WEIGHT * sum(told.values()), "fill": fill, "keep": keep, **told}

    train("features", model, loss_step, args)
    save_half(model.network, args.output)


if __name__ == "__main__":
    main()
