from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.consistency import FlowPath
from diffusers_mcm.distillation.adversarial import AdversarialStep, RealPairs
from diffusers_mcm.distillation.draws import Coins, draw_adversarial, draw_step
from diffusers_mcm.distillation.motion import build_motion
from diffusers_mcm.distillation.student import Student
from diffusers_mcm.lora import add_lora, fused, lora_disabled, lora_state_dict
from tests.distillation.discriminator.tiny import random_tensor, tiny_discriminator
from tests.tiny import NUM_FRAMES, SCHEDULER, SIZE, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from tests.training.world import CAPTIONS, tiny_config

BASE = get_base_model("modelscope")
SHAPE = (4, NUM_FRAMES, SIZE // 2, SIZE // 2)
INDICES = [0, 1]


def make_student(path=None, **overrides) -> Student:
    config = tiny_config(dict(pretrained_teacher_model="teacher", video_data="videos"), "out", **overrides)
    denoiser, vae = tiny_unet().requires_grad_(False), tiny_vae().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    add_lora(denoiser, BASE.lora_target_modules(denoiser), 2, 2, generator=generator)
    for name, tensor in lora_state_dict(denoiser).items():
        if "lora_B" in name:  # as after some training: the student is not the teacher
            tensor.normal_(std=0.05, generator=generator)
    return Student(
        BASE,
        denoiser,
        vae,
        path or BASE.noise_path(SCHEDULER),
        build_motion(config.motion, 4),
        config.method,
        teacher=partial(lora_disabled, denoiser),
        fused=partial(fused, denoiser) if config.fuse_lora else None,
    ).eval()


def make_draws(student, timestep: int | None = None, indices=INDICES, steps=50):
    draws = draw_step(0, indices, SHAPE, student.path.solver_timesteps(steps), (5.0, 15.0), 2, Coins())
    if timestep is not None:
        draws.timestep.fill_(timestep)
    return draws


def encode(captions):
    return BASE.encode_text(tiny_tokenizer(), tiny_text_encoder(), list(captions))


PIXELS = random_tensor(2, 3, NUM_FRAMES, SIZE, SIZE)
TEXT, NEGATIVE = encode(CAPTIONS[:2]), encode(["", ""])


def make_adversary(student):
    discriminator = tiny_discriminator(judges_changes=student.config.lambda_change > 0)
    text, real_text = discriminator.encode_text(CAPTIONS[:2]).repeat_interleave(2, 0), random_tensor(4, 12)
    draws = draw_adversarial(0, INDICES, 2)
    pair = (random_tensor(4, 3, SIZE, SIZE, seed=seed) for seed in (2, 3))
    pairs = RealPairs(*pair, text) if student.config.lambda_change else None
    return AdversarialStep(
        discriminator, student.config, draws, text, random_tensor(4, 3, SIZE, SIZE, seed=1), real_text, pairs
    )


def student_prediction(student, draws) -> torch.Tensor:
    """What the student says of the clean latents, found out from what is decoded of them."""
    seen = []

    class Watched(type(student.base)):
        def decode_frames(self, vae, latents, *arguments, **options):
            seen.append(latents)
            return super().decode_frames(vae, latents, *arguments, **options)

    base, student.base = student.base, Watched()
    student(PIXELS, TEXT, NEGATIVE, draws, make_adversary(student))
    student.base = base
    return seen[0]


def in_double(draws):
    return type(draws)(
        **{key: each.double() if each.is_floating_point() else each for key, each in vars(draws).items()}
    )


def test_plain_lcm_is_the_distance_to_diffusers_ddim_step():
    """In float64, but for the coefficients, which both have in float32 and round at different places."""
    student = make_student(motion="raw", lambda_real=1.0, lambda_adv=0.0).double()
    text, negative = ({key: value.double() for key, value in each.items()} for each in (TEXT, NEGATIVE))
    draws = make_draws(student)
    draws.timestep.copy_(torch.tensor([499, 19]))
    draws = in_double(draws)
    loss = student(PIXELS.double(), text, negative, draws).total

    ddim = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)  # its step lands on t - 20; below 0 it takes the first alpha, timestep 0's
    network = partial(BASE.denoise, student.denoiser)
    with torch.no_grad():
        x_0 = BASE.encode_video(student.vae, PIXELS.double(), draws.encoder_noise)
        x_t = ddim.add_noise(x_0, draws.noise, draws.timestep)
        with lora_disabled(student.denoiser):
            conditional = network(x_t, draws.timestep, text)
            unconditional = network(x_t, draws.timestep, negative)
        guided = conditional + draws.guidance.reshape(-1, 1, 1, 1, 1) * (conditional - unconditional)
        steps = [ddim.step(guided[i], int(draws.timestep[i]), x_t[i]).prev_sample for i in range(2)]
        stepped, t_prev, f = torch.stack(steps), torch.tensor([479, 0]), student.path.consistency_function
        target = f(network(stepped, t_prev, text), stepped, t_prev)
        difference = f(network(x_t, draws.timestep, text), x_t, draws.timestep) - target
    expected = ((difference**2 + 0.001**2).sqrt() - 0.001).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_total_is_the_weighted_sum():
    student = make_student(lambda_adv=0.25)
    losses = student(PIXELS, TEXT, NEGATIVE, make_draws(student), make_adversary(student))
    torch.testing.assert_close(losses.total, losses.consistency + 0.25 * losses.generator.loss)


def test_the_temporal_distance_adds_to_the_total_and_changes_nothing_else():
    without, weighed = make_student(lambda_adv=0.25), make_student(lambda_adv=0.25, lambda_temporal=0.5)
    draws = make_draws(without)
    plain, losses = (each(PIXELS, TEXT, NEGATIVE, draws, make_adversary(each)) for each in (without, weighed))
    assert plain.temporal is None and losses.temporal.item() > 0
    assert torch.equal(plain.consistency, losses.consistency)
    torch.testing.assert_close(losses.total, plain.total + 0.5 * losses.temporal)
    alone = make_student(lambda_adv=0.0, lambda_temporal=0.5)(PIXELS, TEXT, NEGATIVE, draws)
    torch.testing.assert_close(alone.total, plain.consistency + 0.5 * losses.temporal)


@pytest.mark.parametrize("timestep, depends", [(999, False), (979, True)])
def test_a_trajectory_from_the_terminal_timestep_knows_nothing_of_the_video(timestep, depends):
    student = make_student(lambda_real=1.0, lambda_adv=0.0)
    draws = make_draws(student, timestep)
    with torch.no_grad():
        losses = [student(pixels, TEXT, NEGATIVE, draws).total for pixels in (PIXELS, -PIXELS)]
    assert torch.equal(*losses) != depends


def test_a_generated_trajectory_is_the_students_own_and_its_video_is_not_read():
    student = make_student(lambda_real=0.5, lambda_adv=0.0)
    draws = make_draws(student, 499)
    draws.coin.copy_(torch.tensor([0.9, 0.1]))  # generated, real
    with torch.no_grad():
        loss = student(PIXELS, TEXT, NEGATIVE, draws).total
        unread = torch.stack([-PIXELS[0], PIXELS[1]])
        assert torch.equal(loss, student(unread, TEXT, NEGATIVE, draws).total)
        read = torch.stack([PIXELS[0], -PIXELS[1]])
        assert not torch.equal(loss, student(read, TEXT, NEGATIVE, draws).total)
        draws.start_noise[0] *= -1
        assert not torch.equal(loss, student(PIXELS, TEXT, NEGATIVE, draws).total)


# --- a phase, as of one of two experts -------------------------------------------------------------------------------
HIGH, LOW = FlowPath().split(0.875)


@pytest.mark.parametrize(("path", "times"), [(HIGH, [937.5, 1000.0]), (LOW, [875.0, 625.0])])
def test_the_distance_is_that_of_the_phased_consistency_function_after_an_euler_step(path, times):
    """In float64: x_t − (σ − σ') v_guided, and f = x + (σ_end − σ) v."""
    student = make_student(path, motion="raw", lambda_real=1.0, lambda_adv=0.0, num_solver_steps=48).double()
    text, negative = ({key: value.double() for key, value in each.items()} for each in (TEXT, NEGATIVE))
    draws = in_double(make_draws(student, steps=48))
    t = torch.tensor(times)
    draws.timestep.copy_(t)
    loss = student(PIXELS.double(), text, negative, draws).total
    network, w = partial(BASE.denoise, student.denoiser), draws.guidance.reshape(-1, 1, 1, 1, 1)
    t_prev = path.previous_timestep(t, 48)
    sigma, sigma_prev = (each.double().reshape(-1, 1, 1, 1, 1) / 1000 for each in (t, t_prev))
    with torch.no_grad():
        x_0 = BASE.encode_video(student.vae, PIXELS.double(), draws.encoder_noise)
        at_end = (1 - path.end) * x_0 + path.end * draws.start_noise
        keep = (1 - sigma) / (1 - path.end)
        x_t = keep * at_end + (sigma**2 - (keep * path.end) ** 2).sqrt() * draws.noise
        with lora_disabled(student.denoiser):
            conditional, unconditional = network(x_t, t, text), network(x_t, t, negative)
        x_prev = x_t + (sigma_prev - sigma) * (conditional + w * (conditional - unconditional))
        target = x_prev + (path.end - sigma_prev) * network(x_prev, t_prev, text)
        difference = x_t + (path.end - sigma) * network(x_t, t, text) - target
    expected = ((difference**2 + 0.001**2).sqrt() - 0.001).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_one_step_above_the_boundary_the_target_is_the_teachers_step_itself():
    """There f is the identity: the student's network has no say in what it learns."""
    student = make_student(HIGH, motion="raw", lambda_real=1.0, lambda_adv=0.0, num_solver_steps=48)
    lowest = float(HIGH.solver_timesteps(48)[0])
    assert HIGH.previous_timestep(torch.tensor([lowest]), 48) == 875
    x, t = random_tensor(2, *SHAPE), torch.full((2,), 875.0)
    assert torch.equal(HIGH.consistency_function(BASE.denoise(student.denoiser, x, t, TEXT), x, t), x)


@pytest.mark.parametrize(("path", "timestep"), [(HIGH, 937.5), (LOW, 625.0)])
def test_the_judge_sees_what_is_clean(path, timestep, monkeypatch):
    """Not what a phase ends in, which above the boundary is nearly noise."""
    student = make_student(path, lambda_real=1.0, num_solver_steps=48)
    draws = make_draws(student, steps=48)
    draws.timestep.fill_(timestep)
    judged, outputs = [], []
    monkeypatch.setattr(
        student.base,
        "decode_frames",
        lambda vae, latents, *_, **__: judged.append(latents) or torch.zeros(4, 3, SIZE, SIZE),
        raising=False,
    )
    denoise = type(BASE).denoise

    def watched(self, denoiser, x, t, text):
        outputs.append((x, denoise(self, denoiser, x, t, text)))
        return outputs[-1][1]

    monkeypatch.setattr(type(BASE), "denoise", watched)
    student(PIXELS, TEXT, NEGATIVE, draws, make_adversary(student))
    x_t, output = outputs[-1]
    torch.testing.assert_close(judged[0], x_t - timestep / 1000 * output)


@pytest.mark.parametrize(("path", "reads"), [(HIGH, False), (LOW, True)])
def test_whether_a_students_own_sample_starts_from_the_video(path, reads):
    student = make_student(path, lambda_real=0.5, lambda_adv=0.0, num_solver_steps=48)
    draws = make_draws(student, steps=48)
    draws.coin.copy_(torch.tensor([0.9, 0.9]))
    draws.timestep.fill_(float(path.solver_timesteps(48)[2]))
    with torch.no_grad():
        losses = [student(pixels, TEXT, NEGATIVE, draws).total for pixels in (PIXELS, -PIXELS)]
    assert torch.equal(*losses) != reads


def test_the_target_head_is_the_moving_average_and_gets_no_gradient():
    student = make_student(lambda_adv=0.0)
    draws = make_draws(student)
    with torch.no_grad():
        loss = student(PIXELS, TEXT, NEGATIVE, draws).total
        student.target_motion.conv_out.weight.fill_(0.1)
        assert not torch.equal(loss, student(PIXELS, TEXT, NEGATIVE, draws).total)
    assert not any(parameter.requires_grad for parameter in student.target_motion.parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_under_autocast_both_sides_of_the_distance_are_float32(kind):
    """The networks' outputs and what the motion head makes of them: half types do not tell c = 0.001 apart."""
    student = make_student(lambda_adv=0.0)
    for module in (student.denoiser, student.vae):
        for name, parameter in module.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(kind)
    for head in (student.motion, student.target_motion):  # no longer the identity
        torch.nn.init.normal_(head.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    seen = []
    for module in (student.motion, student.target_motion, student.motion.conv_in, student.target_motion.conv_out):
        module.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    text, negative = ({key: value.to(kind) for key, value in each.items()} for each in (TEXT, NEGATIVE))
    with torch.autocast("cpu", torch.bfloat16):
        losses = student(PIXELS, text, negative, make_draws(student, 999))
    losses.total.backward()
    assert len(seen) == 8 and {tensor.dtype for tensor in seen} == {torch.float32}
    heads = [seen[i] for i in range(8) if seen[i].shape[1] == 4]
    assert not any(torch.equal(each, each.bfloat16().float()) for each in heads)
    assert losses.total.dtype == torch.float32 and student.motion.conv_out.weight.grad.any()


def test_a_fused_lora_gives_the_same_losses_and_gradients():
    results = []
    for fuse_lora in (False, True):
        torch.manual_seed(0)
        student = make_student(fuse_lora=fuse_lora).double()
        text, negative = ({key: value.double() for key, value in each.items()} for each in (TEXT, NEGATIVE))
        draws = in_double(make_draws(student))
        losses = student(PIXELS.double(), text, negative, draws)
        losses.total.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        results.append((losses.total, gradients))
    (loss, gradients), (fused_loss, fused_gradients) = results
    torch.testing.assert_close(fused_loss, loss)
    assert gradients.keys() == fused_gradients.keys() and any("lora_A" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-9)
