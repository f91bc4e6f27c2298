import dataclasses
import json

import pytest

from diffusers_mcm.training.arguments import build_parser, parse_config
from diffusers_mcm.training.config import TrainingConfig

REQUIRED = dict(pretrained_teacher_model="teacher", video_data="videos")


def config(**overrides):
    return TrainingConfig(**(REQUIRED | overrides))


def test_learning_rates_scale_with_the_batch_and_the_frames():
    assert config().learning_rates(128) == (5e-6, 1e-4)
    assert config().learning_rates(64) == (2.5e-6, 5e-5)
    assert config(scale_lr=False).learning_rates(64) == (5e-6, 5e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(motion="optical"), "--motion must be one of raw, diff, corr, low, high, learnable, not 'optical'"),
        (dict(discriminator_loss="wgan"), "--discriminator_loss must be one of hinge, hinge_mean, not 'wgan'"),
        (
            dict(discriminator_augmentation=("colour", "blur")),
            "--discriminator_augmentation must be one of colour, translation, cutout, not 'blur'",
        ),
        (dict(mixed_precision="fp8"), "--mixed_precision must be one of no, fp16, bf16, not 'fp8'"),
        (dict(report_to="paper"), "--report_to must be one of tensorboard"),
        (dict(lambda_real=1.5), "--lambda_real must be between 0 and 1, not 1.5"),
        (dict(lambda_adv=-1.0), "--lambda_adv must be 0 or more, not -1.0"),
        (dict(lambda_adv=float("nan")), "--lambda_adv must be 0 or more, not nan"),
        (dict(train_batch_size=0), "--train_batch_size must be greater than 0, not 0"),
        (dict(adam_beta2=1.0), "--adam_beta2 must be below 1"),
        (
            dict(pretrained_lora_subfolder="anime"),
            "--pretrained_lora_subfolder has no effect without --pretrained_lora",
        ),
        (dict(ema_decay=1.0), "--ema_decay must be below 1"),
        (dict(gradient_penalty_growth=0.5), "--gradient_penalty_growth must be 1 or more, not 0.5"),
        (dict(image_text="caption"), "--image_text must be one of auto, own, prompt, none, not 'caption'"),
        (dict(discriminator_crop="centre"), "--discriminator_crop must be one of random, resized, none, not 'centre'"),
        (dict(video_data=""), "--video_data must not be empty"),
        (dict(guidance_min=3.0), "--guidance_min and --guidance_max belong together"),
        (dict(guidance_min=3.0, guidance_max=1.0), "--guidance_min must not exceed --guidance_max, but 3.0 > 1.0"),
        (dict(num_frames=1), r"--num_adversarial_frames \(2\) must not exceed --num_frames \(1\)"),
        (dict(num_inference_steps=8, num_solver_steps=5), r"--num_inference_steps \(8\) must not exceed .* \(5\)"),
        (
            dict(frame_interval=8, data_fps=8.0),
            r"--frame_interval \(8\) takes frames by number, --data_fps \(8\) by time",
        ),
        (dict(data_fps=0.0), "--data_fps must be greater than 0, not 0.0"),
        (dict(num_frames=1, lambda_adv=0.0, motion="diff"), "--motion diff compares consecutive frames"),
        (dict(lora_modules="half"), "--lora_modules must be one of all, spatial, temporal, not 'half'"),
        (
            dict(num_frames=1, lambda_adv=0.0, lora_modules="temporal"),
            "--lora_modules temporal relates frames to each other: --num_frames must be 2 or more",
        ),
        (
            dict(num_frames=1, lambda_adv=0.0, lambda_temporal=0.5),
            "--lambda_temporal 0.5 compares a clip's frames: --num_frames must be 2 or more",
        ),
        (
            dict(num_frames=1, num_adversarial_frames=1, lambda_change=0.5),
            "--lambda_change 0.5 compares a clip's frames: --num_frames must be 2 or more",
        ),
        (
            dict(lambda_adv=0.0, lambda_change=0.5),
            "--lambda_change 0.5 needs the discriminator: --lambda_adv must not",
        ),
        (dict(lambda_temporal=-1.0), "--lambda_temporal must be 0 or more, not -1.0"),
        (dict(coin="toss"), "--coin must be one of sample, batch, not 'toss'"),
        (dict(timesteps="late"), "--timesteps must be one of uniform, visited, not 'late'"),
        (dict(fuse_lora=True, mixed_precision="bf16"), "--fuse_lora needs --mixed_precision no: in bf16 most of"),
        (dict(fuse_lora=True, gradient_checkpointing=True), "--fuse_lora spends memory, which --gradient_checkpoi"),
        (dict(hub_model_id="me/lora"), "--hub_model_id has no effect without --push_to_hub"),
        (dict(overwrite_card=True), "--overwrite_card has no effect without --push_to_hub"),
        (dict(report_to="wandb", hub_token="hf_x", push_to_hub=True), "--report_to wandb would record --hub_token"),
        (
            dict(report_to="clearml", hub_token="hf_x", push_to_hub=True),
            "--report_to clearml would record --hub_token",
        ),
    ],
)
def test_what_makes_no_sense_is_rejected(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_images_are_announced_as_unread_without_a_discriminator():
    with pytest.warns(UserWarning, match="--image_data is not read with --lambda_adv 0"):
        config(image_data="images", lambda_adv=0.0)


def test_saved_values_are_plain_and_keep_no_secret():
    values = config(hub_token="hf_secret", validation_prompts=["a", "b"]).to_dict()
    assert "hf_secret" not in json.dumps(values)
    assert values["validation_prompts"] == ["a", "b"]


def test_every_field_is_a_documented_flag():
    text = " ".join(build_parser().format_help().split())
    for entry in dataclasses.fields(TrainingConfig):
        assert f"--{entry.name}" in text
        assert " ".join(entry.metadata["help"].split())[:40] in text


def test_the_command_line_makes_the_same_configuration():
    flags = "--pretrained_teacher_model teacher --video_data videos --motion raw --lambda_real 1 --lambda_adv 0"
    flags += " --no_scale_lr --gradient_checkpointing --num_frames 8 --validation_prompts one"
    expected = config(
        motion="raw",
        lambda_real=1.0,
        lambda_adv=0.0,
        scale_lr=False,
        gradient_checkpointing=True,
        num_frames=8,
        validation_prompts=("one",),
    )
    assert parse_config(flags.split()) == expected
    assert parse_config(["--pretrained_teacher_model", "teacher", "--video_data", "videos"]) == config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--video_data", "videos"], "--pretrained_teacher_model"),
        (["--pretrained_teacher_model", "t", "--video_data", "v", "--lambda_real", "2"], "between 0 and 1, not 2.0"),
        (["--pretrained_teacher_model", "t", "--video_data", "v", "--lr", "2"], "unrecognized arguments: --lr"),
    ],
)
def test_a_bad_command_line_ends_with_its_reason(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_config(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
