"""That the discriminator cannot tell real from generated images by their texts, as a run pairs them."""

import csv
import json
import logging
import re
from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mcm.data import ImageDataset, VideoDataset
from diffusers_mcm.distillation.adversarial import GeneratorLoss
from diffusers_mcm.distillation.discriminator import Discriminator, DiscriminatorHeads
from diffusers_mcm.features import TextFeatures
from diffusers_mcm.training.batches import choose_image_text
from diffusers_mcm.training.loop import Trainer
from tests.distillation.discriminator.tiny import FEATURE_DIM, TEXT_DIM, tiny_clip_text
from tests.tiny import tiny_tokenizer

from .world import CAPTIONS, IMAGE_SIZE, tiny_config

STEPS = 300
NUM_IMAGES = 64
OTHER_KIND = ("a ring", "a cyan square", "growing", "white and black")
CAPTION_SETS = {"none": None, "another kind": OTHER_KIND, "the videos'": CAPTIONS}


def make_images(folder, captions, missing=0):
    """Pictures of coarse noise, which have each of the captions equally often; the first `missing` have none."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(NUM_IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST).save(
            folder / f"{number:02d}.png"
        )
        rows.append(
            (f"{number:02d}.png", "" if number < missing else captions[number % len(captions)] if captions else "")
        )
    if captions:
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "caption"), *rows])
    return folder


class Patches(torch.nn.Module):
    """A frozen network that takes a moment: each patch of 8 × 8 pixels seen through a fixed random matrix."""

    input_size = IMAGE_SIZE

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randn(FEATURE_DIM, 3, 8, 8, generator=generator) / 8)

    def forward(self, images):
        return [torch.nn.functional.conv2d(images, self.kernel, stride=8).flatten(2).mT]


@pytest.fixture
def small_discriminator(monkeypatch):
    """Such features, and clips that are not decoded, at which nothing here looks."""

    def build(features, text, generator, judges_changes, **options):
        heads = DiscriminatorHeads(1, FEATURE_DIM, TEXT_DIM, generator)
        return Discriminator(Patches(), heads, TextFeatures(tiny_clip_text(), tiny_tokenizer()), **options)

    def blank(media, num_frames, interval, height, width, *rest, **options):
        return np.zeros((num_frames, height, width, 3), dtype=np.uint8)

    monkeypatch.setattr("diffusers_mcm.training.networks.Discriminator.with_fresh_heads", build)
    monkeypatch.setattr("diffusers_mcm.data.dataset.read_clip", blank)
    monkeypatch.setattr("diffusers_mcm.data.dataset.check_clip", lambda *args: None)


class Experiment:
    """A run's own batches, texts and discriminator, with the data set's own pictures for generated ones.

    A generated picture is one of those that have its prompt for caption, or any if none has: what a perfect student
    draws. Nothing but the text could tell it from a real one.
    """

    def __init__(self, world, folder, captions, missing=0, **options):
        images = make_images(folder / "images", captions, missing)
        config = tiny_config(
            world | {"image_data": str(images)},
            folder / "out",
            max_train_steps=STEPS,
            discriminator_learning_rate=1e-2,
            lr_scheduler="constant",
            gradient_penalty_weight=0.0,
            discriminator_augmentation=(),
            **options,
        )
        self.trainer = Trainer(config)
        shown = make_images(folder / "all captioned", captions)  # what a picture shows, whether or not it says so
        data = ImageDataset(shown, size=(config.height, config.width), seed=1)
        self.pictures = [data[index] for index in range(NUM_IMAGES)]
        self.rng = np.random.default_rng(0)

    def draw(self, prompt):
        fitting = [picture for picture in self.pictures if picture["caption"] == prompt] or self.pictures
        return fitting[self.rng.integers(len(fitting))]["pixels"]

    def hinge(self, change_texts=lambda batch: batch, change_fakes=lambda images: images, until=0.0) -> float:
        """Mean over 20 steps at the end of the discriminator's training, which ends early where that is below `until`.

        The batches of the first two epochs of the images come again and again: reading them is what takes long.
        """
        trainer, losses = self.trainer, deque(maxlen=20)
        discriminator = trainer.networks.discriminator
        batches = list(islice(trainer.batches, 2 * NUM_IMAGES // 8))
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            prompts = [caption for caption in batch.captions for _ in range(2)]
            batch = change_texts(batch)
            adversary = trainer.adversary(batch, trainer.draw(batch))
            fake = change_fakes(torch.stack([self.draw(prompt) for prompt in prompts]))
            generated = GeneratorLoss(fake, discriminator.extract(fake, adversary.draws.fake))
            loss, *_ = adversary.discriminator_loss(trainer.discriminator.module, generated)
            loss.backward()
            trainer.discriminator.update(None)
            discriminator.heads.update_spectral_norm()
            losses.append(loss.item())
            if len(losses) == 20 and np.mean(losses) < until:
                break
        return float(np.mean(losses))


@pytest.mark.parametrize("captions", CAPTION_SETS)
def test_on_the_same_pictures_the_texts_give_nothing_away(world, tmp_path, small_discriminator, captions):
    experiment = Experiment(world, tmp_path, CAPTION_SETS[captions])
    assert experiment.trainer.data.image_text.choice == ("own" if captions == "the videos'" else "none")
    assert experiment.hinge() == pytest.approx(2.0, abs=0.2)


def test_nor_do_captions_that_some_images_lack(world, tmp_path, small_discriminator):
    """A prompt beside those would be one that a real image does not show, and a generated one does."""
    experiment = Experiment(world, tmp_path, CAPTIONS, missing=60)
    assert experiment.trainer.data.image_text.choice == "own"
    assert experiment.hinge() == pytest.approx(2.0, abs=0.2)


def test_no_text_against_prompts_would_give_it_away(world, tmp_path, small_discriminator):
    def leak(batch):
        return batch._replace(
            real_texts=[""] * 8, fake_texts=[caption for caption in batch.captions for _ in range(2)]
        )

    assert Experiment(world, tmp_path, None).hinge(change_texts=leak, until=0.5) < 0.5


def test_captions_of_another_kind_would_give_it_away(world, tmp_path, small_discriminator):
    assert Experiment(world, tmp_path, OTHER_KIND, image_text="own").hinge(until=0.5) < 0.5


@pytest.mark.parametrize("captions", ["none", "the videos'"])
def test_other_pictures_are_still_told(world, tmp_path, small_discriminator, captions):
    experiment = Experiment(world, tmp_path, CAPTION_SETS[captions])
    assert experiment.hinge(change_fakes=lambda images: images / 2, until=0.5) < 0.5


# --- the choice ------------------------------------------------------------------------------------------------------


def open_both(world, images):
    videos = VideoDataset(world["video_data"], num_frames=2)
    return ImageDataset(images), videos


@pytest.mark.parametrize(
    ("captions", "missing", "rule", "reason"),
    [
        (None, 0, "none", "images have no captions"),
        (OTHER_KIND, 0, "none", "captions of images and videos overlap by 0%"),
        (CAPTIONS, 0, "own", "overlap by 100%$"),
        (CAPTIONS, 20, "own", "overlap by 100%, 20 of 64 images have none"),
        (CAPTIONS[:2], 0, "none", "overlap by 50%"),
    ],
)
def test_own_captions_are_taken_where_both_sets_are_alike(world, tmp_path, captions, missing, rule, reason):
    images, videos = open_both(world, make_images(tmp_path / "images", captions, missing))
    chosen = choose_image_text("auto", images, videos)
    assert chosen.choice == rule and re.search(reason, chosen.reason) and chosen.warning is None
    assert choose_image_text("auto", images, videos) == chosen
    asked = choose_image_text("own", images, videos)
    assert asked.choice == "own" and (asked.warning is None) == (rule == "own" or captions is None)
    assert "do not show their texts" in choose_image_text("prompt", images, videos).warning


def test_frames_have_their_own_captions_and_large_sets_are_not_compared(world, tmp_path, monkeypatch):
    images, videos = open_both(world, make_images(tmp_path / "images", CAPTIONS))
    assert choose_image_text("auto", videos, videos).choice == "own"
    monkeypatch.setattr("diffusers_mcm.training.batches.MAX_COMPARED", 63)
    chosen = choose_image_text("auto", images, videos)
    assert (chosen.choice, chosen.reason) == ("none", "captions of more than 63 items are not compared")
    assert choose_image_text("own", images, videos).warning is None  # nothing is known against it


def test_the_rule_is_told_recorded_and_kept(world, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    options = dict(max_train_steps=1, checkpointing_steps=1)
    out = Trainer(tiny_config(world, tmp_path, image_text="own", **options)).train()
    assert (
        "Text beside real images: own (as --image_text says; captions of images and videos overlap by 0%)"
        in caplog.text
    )
    assert "its loss may fall to 0.00 without a look at them" in caplog.text
    assert json.loads((out / "mcm_config.json").read_text())["training"]["image_text"] == "own"
    again = dict(resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(ValueError, match="image_text was own, is none"):
        Trainer(tiny_config(world, tmp_path, **again))
    # What counts is what was done, not how it was asked for.
    monkeypatch.setattr("diffusers_mcm.training.run.check_data", lambda *_: None)  # of other data than before
    captioned = dict(image_data=str(make_images(tmp_path / "images", CAPTIONS)))
    assert Trainer(tiny_config(world | captioned, tmp_path, **again)).step == 1
