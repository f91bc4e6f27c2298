"""Says what a discriminator can learn to hold against a video through a feature network, before a LoRA is distilled.

Its heads learn to tell the caption of a clean image from one that is wrong in a single attribute; then how often they
do so for captions that they never saw is printed, attribute by attribute. 50 % is what guessing gives.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Frames, to_pixels

from diffusers_mcm.distillation.discriminator import Discriminator
from diffusers_mcm.distillation.losses import get_discriminator_loss
from diffusers_mcm.features import PatchFeatures, TextFeatures
from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, SHAPES, Caption, held_out_captions, parse
from diffusers_mcm.shapes.render import render_image

ATTRIBUTES = {"colour": list(COLOURS), "shape": list(SHAPES), "background": list(BACKGROUNDS)}
BATCH = 16


def spoil(caption: Caption, attribute: str, rng: np.random.Generator) -> Caption:
    """The caption with another word for one attribute."""
    words = [word for word in ATTRIBUTES[attribute] if word != getattr(caption, attribute)]
    return caption._replace(**{attribute: words[rng.integers(len(words))]})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    p.add_argument("--features", default="mcm-shapes-features", help="packaged name, folder or Hub repository")
    p.add_argument("--text", default="mcm-shapes-clip", help="likewise")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    data, rng = Frames(args.data), np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    frozen = PatchFeatures.from_pretrained(args.features), TextFeatures.from_pretrained(args.text)
    discriminator = Discriminator.with_fresh_heads(*frozen, generator=generator, augmentation=())
    heads, hinge = discriminator.heads, get_discriminator_loss("hinge")
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-4, weight_decay=0.0)

    def features(images: np.ndarray) -> list[torch.Tensor]:
        with torch.no_grad():
            return discriminator.features(to_pixels(images))

    def text(captions: list[Caption]) -> torch.Tensor:
        return discriminator.encode_text([str(caption) for caption in captions])

    for _ in range(args.steps):
        chosen = rng.integers(len(data.images["clean"]), size=BATCH)
        captions = [parse(data.captions["clean"][index]) for index in chosen]
        wrong = [spoil(caption, rng.choice(list(ATTRIBUTES)), rng) for caption in captions]
        seen = features(data.images["clean"][chosen])
        loss = hinge.discriminator(heads(seen, text(captions)), heads(seen, text(wrong)), 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        heads.update_spectral_norm()

    captions = [caption for caption in held_out_captions() for _ in range(8)]
    seen = features(np.stack([render_image(caption, seed, "clean") for seed, caption in enumerate(captions)]))
    with torch.no_grad():
        right = heads(seen, text(captions)).mean(1)
        for attribute in ATTRIBUTES:
            wrong = heads(seen, text([spoil(caption, attribute, rng) for caption in captions])).mean(1)
            print(f"{attribute}: {100 * (right > wrong).float().mean():.1f} % of {len(captions)}")


if __name__ == "__main__":
    main()
