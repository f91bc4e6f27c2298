import pytest
import torch

from diffusers_mcm.distillation.discriminator import Discriminator
from diffusers_mcm.distillation.discriminator.augment import AugmentationDraws, crop_and_resize, draw_augmentation
from diffusers_mcm.features import PatchFeatures, TextFeatures
from tests.distillation.discriminator.tiny import (
    BLOCKS,
    IMAGE_SIZE,
    NUM_PATCHES,
    random_tensor,
    tiny_clip_text,
    tiny_dinov2,
    tiny_discriminator,
)
from tests.tiny import tiny_tokenizer

COUNT = 4
PROMPTS = ["a red circle growing", "a blue ring shrinking", "a green square moving up", "a ring"]


def generators(purpose):
    return [torch.Generator().manual_seed(10 * purpose + index) for index in range(COUNT)]


def augmentation(purpose):
    return AugmentationDraws.cat([draw_augmentation(generator) for generator in generators(purpose)])


WEIGHTS = torch.cat([torch.rand(1, generator=generator) for generator in generators(3)])


def training_step(discriminator, frames, images, part=slice(None)):
    """The losses of one training step on a part of the batch, as sums over its images."""
    fake_text = discriminator.encode_text(PROMPTS[part])
    real_text = discriminator.encode_text(PROMPTS[::-1][part])
    fake = discriminator.extract(frames[part], augmentation(1)[part])
    generator_loss = -discriminator.generator_logits(fake, fake_text).mean(1).sum()
    with torch.no_grad():
        real = discriminator.extract(images[part], augmentation(2)[part])
    output = discriminator(fake, fake_text, real, real_text, WEIGHTS[part])
    hinge = (1 + output.fake_logits).relu().mean(1) + (1 - output.real_logits).relu().mean(1)
    return generator_loss, (hinge + output.penalty).sum()


@pytest.fixture
def frames():
    return random_tensor(COUNT, 3, 40, 40).requires_grad_()


@pytest.fixture
def images():
    return random_tensor(COUNT, 3, 48, 36, seed=1)


def test_generator_step_reaches_only_the_pixels(frames, images):
    discriminator = tiny_discriminator()
    generator_loss, _ = training_step(discriminator, frames, images)
    generator_loss.backward()
    assert (frames.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_augmentation_is_a_choice(frames):
    plain = tiny_discriminator()
    plain.augmentation = ()
    draws = augmentation(1)
    torch.testing.assert_close(plain.extract(frames, draws).pixels, crop_and_resize(frames, draws, IMAGE_SIZE))
    assert not torch.allclose(tiny_discriminator().extract(frames, draws).pixels, plain.extract(frames, draws).pixels)


def test_discriminator_step_reaches_only_the_heads(frames, images):
    discriminator = tiny_discriminator()
    _, loss = training_step(discriminator, frames, images.requires_grad_())
    loss.backward()
    assert frames.grad is None and images.grad is None
    assert all(parameter.grad is None for parameter in discriminator.features.parameters())
    assert all(parameter.grad is None for parameter in discriminator.text.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.heads.parameters())


def test_both_steps_see_the_same_logits(frames):
    discriminator = tiny_discriminator()
    text = discriminator.encode_text(PROMPTS)
    fake = discriminator.extract(frames, augmentation(1))
    output = discriminator(fake, text, fake, text)
    assert output.penalty is None
    assert output.fake_logits.shape == (COUNT, len(BLOCKS) * NUM_PATCHES)
    assert torch.equal(discriminator.generator_logits(fake, text), output.fake_logits)


def test_three_runs_of_the_frozen_network_per_step(frames, images):
    discriminator = tiny_discriminator()
    runs = []
    discriminator.features.model.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for loss in training_step(discriminator, frames, images):
        loss.backward()
    assert runs == [True, False, False]


def test_batch_may_be_split(frames, images):
    whole, split = tiny_discriminator(), tiny_discriminator()
    whole_losses = training_step(whole, frames, images)
    for loss in whole_losses:
        loss.backward()
    whole_gradient, frames.grad = frames.grad, None

    parts = [training_step(split, frames, images, part) for part in (slice(0, 1), slice(1, 4))]
    for losses in parts:
        for loss in losses:
            loss.backward()
    # In float32, whose kernels differ with the batch: a hundred roundings. Whole runs are held to it in float64.
    for index in range(2):
        torch.testing.assert_close(whole_losses[index], sum(p[index] for p in parts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole_gradient, frames.grad, atol=1e-5 * float(whole_gradient.abs().max()), rtol=1e-4)
    for one, other in zip(whole.heads.parameters(), split.heads.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5 * one.grad.abs().max().item() + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(frames, images, dtype):
    exact = training_step(tiny_discriminator(), frames, images)
    discriminator = tiny_discriminator()
    with torch.autocast("cpu", dtype=dtype):
        losses = training_step(discriminator, frames, images)
    for loss, expected in zip(losses, exact):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.05, rtol=0.05)
        loss.backward()
    assert frames.grad.isfinite().all() and frames.grad.abs().sum() > 0
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.heads.parameters())


def test_training_the_heads_tells_two_kinds_of_images_apart():
    discriminator = tiny_discriminator()
    fake_images = torch.full((COUNT, 3, 32, 32), -0.3) + 0.1 * random_tensor(COUNT, 3, 32, 32)
    fake = discriminator.extract(fake_images, augmentation(1)).detach()
    real = discriminator.extract(random_tensor(COUNT, 3, 32, 32, seed=1), augmentation(2)).detach()
    text = discriminator.encode_text(PROMPTS)
    optimizer = torch.optim.AdamW(discriminator.heads.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(15):
        output = discriminator(fake, text, real, text)
        loss = (1 + output.fake_logits).relu().mean() + (1 - output.real_logits).relu().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        discriminator.heads.update_spectral_norm()
    assert output.real_logits.mean() > 0.3 and output.fake_logits.mean() < -0.3


def test_from_pretrained_folders(tmp_path, frames):
    tiny_dinov2(num_hidden_layers=12).save_pretrained(tmp_path / "features")
    tiny_clip_text().save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")

    def load():
        features = PatchFeatures.from_pretrained(str(tmp_path / "features"))
        text = TextFeatures.from_pretrained(str(tmp_path / "text"))
        return Discriminator.with_fresh_heads(features, text, generator=torch.Generator().manual_seed(0))

    logits = []
    for discriminator in (load(), load()):
        fake = discriminator.extract(frames, augmentation(1))
        logits.append(discriminator.generator_logits(fake, discriminator.encode_text(PROMPTS)))
    assert logits[0].shape == (COUNT, 4 * NUM_PATCHES)
    assert torch.equal(*logits)


def test_errors(frames, images):
    discriminator = tiny_discriminator()
    text = discriminator.encode_text(PROMPTS)
    fake = discriminator.extract(frames, augmentation(1))
    real = discriminator.extract(images[:2], augmentation(2)[:2])
    with pytest.raises(ValueError, match="real and generated tensors of one shape"):
        discriminator(fake, text, real, text[:2], WEIGHTS)
