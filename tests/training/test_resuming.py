import json

import pytest

from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.resuming import circumstances, told_changes, values_before_flags


def config(**flags):
    return TrainingConfig(**dict(pretrained_teacher_model="owner/teacher", video_data="videos") | flags)


def test_circumstances_hold_no_absolute_path(tmp_path):
    (tmp_path / "videos").mkdir()
    found = circumstances(config(video_data=str(tmp_path / "videos"), image_data="/none/*.tar"), tmp_path / "out")
    assert found["video_data"] == "../videos" and not found["image_data"].startswith("/")
    assert (found["pretrained_teacher_model"], found["fuse_lora"]) == ("owner/teacher", False)


def test_a_component_that_lies_elsewhere_is_known_by_its_place(tmp_path):
    (tmp_path / "adapter").mkdir()
    given = (f"motion_adapter={tmp_path / 'adapter'}", "image_encoder=owner/encoder")
    found = circumstances(config(extra_repositories=given), tmp_path / "out")
    assert found["extra_repositories"] == ["image_encoder=owner/encoder", "motion_adapter=../adapter"]
    again = circumstances(config(extra_repositories=reversed(given)), tmp_path / "out")
    assert told_changes(json.loads(json.dumps(found)), again, tmp_path) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(extra_repositories=("a=b/c",)), "extra_repositories was ['a=b/c'], is []"),
        (dict(variant="fp16"), "variant was fp16, is None"),
        (dict(ema_decay=0.5), "ema_decay was 0.5, is 0.0"),
        (dict(allow_tf32=True), "allow_tf32 was True, is False"),
        (dict(cache_dtype="bf16"), "cache_dtype was bf16, is exact"),
    ],
)
def test_a_flag_that_is_left_out_of_the_command_that_goes_on_is_told(tmp_path, flags, message):
    """Each of them decides which weights are read or written, or how what a step reads is rounded."""
    then = json.loads(json.dumps(circumstances(config(**flags), tmp_path)))
    assert f"begun with: {message}. If" in told_changes(then, circumstances(config(), tmp_path), tmp_path)


def test_a_run_made_longer_is_told_where_its_rates_depend_on_its_length(tmp_path):
    then = circumstances(config(max_train_steps=10, lr_warmup_steps=0), tmp_path)
    told = told_changes(then, circumstances(config(lr_warmup_steps=0), tmp_path), tmp_path)
    assert told.startswith("max_train_steps was 10, is 30000: from here on the learning rates are")
    flags = dict(lr_scheduler="constant_with_warmup", lr_warmup_steps=0)
    then = circumstances(config(**flags, max_train_steps=10), tmp_path)
    assert told_changes(then, circumstances(config(**flags), tmp_path), tmp_path) is None


@pytest.mark.parametrize("now", [False, True])
def test_a_checkpoint_with_a_flags_old_name_is_compared_with_the_new_one(tmp_path, now):
    then = circumstances(config(), tmp_path)
    then["fold_lora"] = then.pop("fuse_lora")
    told = told_changes(then, circumstances(config(fuse_lora=now), tmp_path), tmp_path)
    assert told is None if not now else "fuse_lora was False, is True" in told


def test_what_was_done_before_there_was_a_flag():
    assert list(values_before_flags().items()) == [("image_text", "own"), ("gradient_penalty_growth", 1.0)]
