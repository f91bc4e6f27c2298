"""The adversarial step reaches what it trains, and nothing else."""

import pytest
import torch

from diffusers_mcm.distillation.discriminator.model import change
from diffusers_mcm.distillation.trajectory import neighbours, pick_frames
from tests.distillation.test_student import (
    NEGATIVE,
    PIXELS,
    TEXT,
    make_adversary,
    make_draws,
    make_student,
    student_prediction,
)


def test_gradients_reach_the_lora_and_the_head_and_then_the_discriminator_only():
    student = make_student()
    adversary = make_adversary(student)
    losses = student(PIXELS, TEXT, NEGATIVE, make_draws(student), adversary)
    losses.total.backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in student.named_parameters() if "lora_" in name or name.startswith("motion.")}
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())

    before = {name: parameter.grad.clone() for name, parameter in student.named_parameters() if name in reached}
    hinge, penalty, of_changes = adversary.discriminator_loss(adversary.discriminator, losses.generator)
    assert losses.generator.change_loss is of_changes is None
    (hinge + penalty).backward()
    reached = {name for name, parameter in adversary.discriminator.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in adversary.discriminator.named_parameters() if name.startswith("heads.")}
    assert all(torch.equal(before[name], dict(student.named_parameters())[name].grad) for name in before)


def test_the_adversarial_loss_alone_reaches_the_lora():
    student = make_student()
    losses = student(PIXELS, TEXT, NEGATIVE, make_draws(student), make_adversary(student))
    losses.generator.loss.backward()
    gradients = [parameter.grad for name, parameter in student.denoiser.named_parameters() if "lora_A" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    assert student.motion.conv_in.weight.grad is None  # the head is judged by the distance only


def test_the_heads_for_changes_see_the_difference_of_a_frame_and_the_next_on_both_sides():
    student = make_student(lambda_change=0.5, lambda_adv=0.25, discriminator_augmentation=())
    adversary, draws = make_adversary(student), make_draws(student)
    shown = []
    adversary.discriminator.change_heads.register_forward_hook(lambda _, arguments, __: shown.append(arguments))
    losses = student(PIXELS, TEXT, NEGATIVE, draws, adversary)
    *_, hinge = adversary.discriminator_loss(adversary.discriminator, losses.generator)

    frames = pick_frames(PIXELS.shape[2], draws.frames)
    with torch.no_grad():
        prediction = student_prediction(student, draws)
        images, beside = (
            adversary.discriminator.extract(
                student.base.decode_frames(student.vae, prediction, each), adversary.draws.fake
            )
            for each in (frames, neighbours(frames, PIXELS.shape[2]))
        )
        real = (adversary.discriminator.extract(each, adversary.draws.real) for each in adversary.pairs[:2])
        fake_changes, real_changes = change(images, beside), change(*real)
        logits = [
            adversary.discriminator.generator_change_logits(each, adversary.text)
            for each in (fake_changes, real_changes)
        ]
    expected = (1 + logits[0]).relu().mean() + (1 - logits[1]).relu().mean()
    torch.testing.assert_close(hinge, expected)
    torch.testing.assert_close(losses.generator.change_loss, -logits[0].mean())
    torch.testing.assert_close(
        losses.total, losses.consistency + 0.25 * losses.generator.loss + 0.5 * losses.generator.change_loss
    )
    assert all(torch.equal(text, adversary.text) for _, text in shown)


def test_judging_changes_leaves_the_rest_as_it_is_and_trains_heads_of_its_own():
    plain, judged = make_student(), make_student(lambda_change=0.5)
    draws = make_draws(plain)
    results = []
    for student in (plain, judged):
        adversary = make_adversary(student)
        losses = student(PIXELS, TEXT, NEGATIVE, draws, adversary)
        results.append((losses, *adversary.discriminator_loss(adversary.discriminator, losses.generator)))
    (one, hinge, penalty, _), (other, same_hinge, more_penalty, of_changes) = results
    assert torch.equal(one.consistency, other.consistency) and torch.equal(one.generator.loss, other.generator.loss)
    assert torch.equal(hinge, same_hinge) and more_penalty > penalty
    of_changes.backward()
    heads = dict(adversary.discriminator.named_parameters())
    assert {name for name, each in heads.items() if each.grad is not None} == {
        name for name in heads if name.startswith("change_heads.")
    }
    other.generator.change_loss.backward()
    gradients = [parameter.grad for name, parameter in judged.denoiser.named_parameters() if "lora_A" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_changes_are_judged_by_a_discriminator_with_heads_for_them_only():
    plain = make_adversary(make_student())
    with pytest.raises(ValueError, match="no heads for changes; make it with judges_changes=True"):
        plain.discriminator.generator_change_logits([], plain.text)
