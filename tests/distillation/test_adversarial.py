"""The adversarial step reaches what it trains, and nothing else."""

import torch

from tests.distillation.test_student import NEGATIVE, PIXELS, TEXT, make_adversary, make_draws, make_student


def test_gradients_reach_the_lora_and_the_head_and_then_the_discriminator_only():
    student = make_student()
    adversary = make_adversary(student)
    losses = student(PIXELS, TEXT, NEGATIVE, make_draws(student), adversary)
    losses.total.backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in student.named_parameters() if "lora_" in name or name.startswith("motion.")}
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())

    before = {name: parameter.grad.clone() for name, parameter in student.named_parameters() if name in reached}
    hinge, penalty = adversary.discriminator_loss(adversary.discriminator, losses.generator.features)
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
