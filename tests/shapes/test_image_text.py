"""What the rule for the text of real images means in the world of shapes."""

import numpy as np
import pytest
import torch

from diffusers_mcm.distillation.discriminator import Discriminator
from diffusers_mcm.distillation.image_text import caption_overlap, pair_texts
from diffusers_mcm.distillation.losses import get_discriminator_loss
from diffusers_mcm.features import PatchFeatures, TextFeatures
from diffusers_mcm.shapes.build import _schedule
from diffusers_mcm.shapes.captions import held_out_captions, training_captions
from diffusers_mcm.shapes.render import render_image

BATCH, STEPS = 16, 60


def test_both_captions_of_the_world_are_alike():
    videos, images = (
        [str(caption) for caption, _ in _schedule(2064, "train", 0, name)] for name in ("video", "clean")
    )
    assert videos != images and caption_overlap(images, videos) == pytest.approx(1.0)


def test_a_wrong_caption_scores_lower_than_the_right_one():
    """After a few steps against pictures that do not show their prompts, on captions that were never seen."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    frozen = PatchFeatures.from_pretrained("mcm-shapes-features"), TextFeatures.from_pretrained("mcm-shapes-clip")
    discriminator = Discriminator.with_fresh_heads(*frozen, generator)
    hinge = get_discriminator_loss("hinge").discriminator
    optimizer = torch.optim.AdamW(discriminator.heads.parameters(), lr=2e-3, weight_decay=0.0)

    def features(captions, first_seed):
        images = [render_image(caption, seed) for seed, caption in enumerate(captions, first_seed)]
        pixels = torch.from_numpy(np.stack(images)).movedim(-1, 1) / 127.5 - 1
        with torch.no_grad():
            return discriminator.features(pixels)

    captions = [training_captions()[index] for index in rng.permutation(516)[:128]]
    texts = [str(caption) for caption in captions]
    seen, embeddings = features(captions, 0), dict(zip(texts, discriminator.encode_text(texts)))
    for _ in range(STEPS):
        real, drawn, asked = rng.permutation(len(captions))[: 3 * BATCH].reshape(3, BATCH)
        both = pair_texts("own", [texts[index] for index in asked], [texts[index] for index in real])
        fake_text, real_text = (torch.stack([embeddings[text] for text in part]) for part in both)
        logits = [
            discriminator.heads([tokens[rows] for tokens in seen], text)
            for rows, text in ((real, real_text), (drawn, fake_text))
        ]
        hinge(*logits, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        discriminator.heads.update_spectral_norm()

    held_out = held_out_captions()
    text, unseen = discriminator.encode_text([str(caption) for caption in held_out]), features(held_out, 1000)
    with torch.no_grad():
        right = discriminator.heads(unseen, text).mean(1)
        wrong = discriminator.heads(unseen, text.roll(7, 0)).mean(1)
    assert (right > wrong).float().mean() > 0.8
    assert (right - wrong).mean() > 0.2
