"""The settings of the method: the paper's, and what goes beyond them."""

from diffusers_mcm.training.arguments import parse_config
from tests.training.test_config import config


def test_defaults_are_the_papers():
    c = config()
    assert (c.motion, c.lambda_real, c.lambda_adv, c.motion_ema_decay) == ("learnable", 0.5, 1.0, 0.95)
    assert (c.lora_rank, c.lora_alpha, c.huber_c, c.timestep_scaling) == (64, 64.0, 0.001, 4.0)
    assert (c.num_adversarial_frames, c.gradient_penalty_weight, c.method.num_solver_steps) == (2, 1e-5, 50)
    assert (c.max_grad_norm, c.lr_scheduler, c.lr_warmup_steps, c.adam_weight_decay) == (10.0, "cosine", 500, 0.0)


def test_augmentation_may_be_chosen_or_left_out():
    command = ["--pretrained_teacher_model", "teacher", "--video_data", "videos"]
    assert parse_config(command).discriminator_augmentation == ("colour", "translation", "cutout")
    assert parse_config([*command, "--discriminator_augmentation", "cutout"]).discriminator_augmentation == ("cutout",)
    assert parse_config([*command, "--discriminator_augmentation"]).discriminator_augmentation == ()
