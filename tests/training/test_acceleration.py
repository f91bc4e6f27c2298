import inspect
import logging
import re
import shutil
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import launch

from diffusers_mcm.training.acceleration import build_accelerator, with_accelerate_settings
from diffusers_mcm.training.loop import Trainer

from .world import tiny_config

PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.fixture
def config(world, tmp_path, monkeypatch):
    for name in (PRECISION, ACCUMULATION):
        monkeypatch.delenv(name, raising=False)
    return lambda **flags: tiny_config(world, tmp_path, **flags)


def test_what_is_not_given_is_what_accelerate_says(config, monkeypatch):
    plain = with_accelerate_settings(config())
    assert (plain.mixed_precision, plain.gradient_accumulation_steps) == ("no", 1)
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(ACCUMULATION, "4")
    told = with_accelerate_settings(config())
    assert (told.mixed_precision, told.gradient_accumulation_steps) == ("bf16", 4)
    accelerator = build_accelerator(told)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("bf16", 4)


def test_a_flag_wins_over_accelerates_environment(config, monkeypatch, caplog):
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(ACCUMULATION, "4")
    given = with_accelerate_settings(config(mixed_precision="no", gradient_accumulation_steps=2))
    accelerator = build_accelerator(given)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 2)
    assert "--mixed_precision no is used; accelerate's environment says bf16" in caplog.text
    assert "--gradient_accumulation_steps 2 is used; accelerate's environment says 4" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            PRECISION,
            "fp8",
            r"mixed precision 'fp8' \(ACCELERATE_MIXED_PRECISION\), and this training does no, fp16, bf16",
        ),
        (
            ACCUMULATION,
            "auto",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be a whole number of 1 or more, not 'auto'",
        ),
        (ACCUMULATION, "0", "must be a whole number of 1 or more, not '0'"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR.*not supported"),
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "DeepSpeed .ACCELERATE_USE_DEEPSPEED. is not supported; launch with plain .* --use_fsdp --fsdp_version 2",
        ),
        ("ACCELERATE_USE_FSDP", "true", "FSDP 1 .* is not supported: launch with --fsdp_version 2"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM .* is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism configuration .* is not supported"),
    ],
)
def test_what_accelerate_can_and_we_cannot_is_refused(config, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        build_accelerator(with_accelerate_settings(config()))


def test_nothing_that_accelerate_can_be_told_to_use_is_passed_over():
    """A plug-in that a later accelerate offers would be neither done nor refused."""
    told = set(re.findall(r"ACCELERATE_USE_\w+", inspect.getsource(launch)))
    honoured = {"ACCELERATE_USE_CPU", "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_USE_FSDP"}
    refused = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"}
    assert told - honoured - refused <= {"ACCELERATE_USE_PARALLELISM_CONFIG"}


def test_how_long_a_process_waits_for_the_others_is_a_flag(config):
    accelerator = build_accelerator(with_accelerate_settings(config(ddp_timeout=7)))
    assert accelerator.init_handler.timeout == timedelta(seconds=7)


def test_a_lora_is_not_fused_in_the_precision_that_accelerate_says(config, monkeypatch):
    monkeypatch.setenv(PRECISION, "bf16")
    with pytest.raises(ValueError, match="--fuse_lora needs --mixed_precision no: in bf16 most of"):
        with_accelerate_settings(config(fuse_lora=True))
    assert with_accelerate_settings(config(fuse_lora=True, mixed_precision="no")).fuse_lora


def test_fp16_that_accelerate_says_needs_a_gpu_too(config, monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv(PRECISION, "fp16")
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU"):
        build_accelerator(with_accelerate_settings(config()))


def test_autocast_keeps_no_cache(config):
    accelerator = build_accelerator(with_accelerate_settings(config(mixed_precision="bf16")))
    with accelerator.autocast():
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("main", [True, False])
def test_what_every_process_would_say_of_the_data_is_said_by_one(world, tmp_path, monkeypatch, caplog, main):
    videos = shutil.copytree(world["video_data"], tmp_path / "videos")
    with (videos / "metadata.csv").open("a") as file:
        file.write("missing.mp4,a circle\n")
    config = tiny_config(world, tmp_path / "out", video_data=str(videos), lambda_adv=0.0, image_data=None)
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: main))
    Trainer(config)
    assert ("missing.mp4" in caplog.text) == main
    caplog.clear()
    for row in (videos / "metadata.csv", *videos.glob("*.mp4")):
        row.unlink()
    with pytest.raises(ValueError, match="holds no video files"):  # an error comes from all
        Trainer(config)
    logging.getLogger("diffusers_mcm.data").warning("as before")
    assert "as before" in caplog.text
