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


@pytest.mark.parametrize("now", [False, True])
def test_a_checkpoint_with_a_flags_old_name_is_compared_with_the_new_one(tmp_path, now):
    then = circumstances(config(), tmp_path)
    then["fold_lora"] = then.pop("fuse_lora")
    told = told_changes(then, circumstances(config(fuse_lora=now), tmp_path), tmp_path)
    assert told is None if not now else "fuse_lora was False, is True" in told


def test_what_was_done_before_there_was_a_flag():
    assert list(values_before_flags().items()) == [("image_text", "own"), ("gradient_penalty_growth", 1.0)]
