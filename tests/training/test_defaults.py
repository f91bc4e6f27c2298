import dataclasses

import pytest

from diffusers_mcm.base_models import get_base_model
from diffusers_mcm.base_models.wan import NEGATIVE_PROMPT
from diffusers_mcm.distillation.trajectory import FRAME_DECODERS
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.defaults import student_settings, with_base_defaults

MODELSCOPE, WAN, TI2V = (get_base_model(name) for name in ("modelscope", "wan", "wan-ti2v"))
NAMES = ("num_solver_steps", "fps", "negative_prompt", "frame_interval", "data_fps", "shift")


def config(**flags):
    return TrainingConfig(**dict(pretrained_teacher_model="owner/teacher", video_data="videos") | flags)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (MODELSCOPE, (50, 8, "", 8, None, None)),
        (WAN, (48, 16, NEGATIVE_PROMPT, None, 16.0, 5.0)),
        (TI2V, (48, 24, NEGATIVE_PROMPT, None, 24.0, 5.0)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_a_base_model_decides(base, expected):
    found = with_base_defaults(config(), base)
    assert tuple(getattr(found, name) for name in NAMES) == expected
    assert with_base_defaults(found, base) == found
    assert found.method.num_solver_steps == expected[0]
    unchanged = {entry.name for entry in dataclasses.fields(found)} - set(NAMES)
    assert all(getattr(found, name) == getattr(config(), name) for name in unchanged)


def test_what_is_given_stays():
    given = dict(num_solver_steps=24, fps=12, negative_prompt="", frame_interval=2, shift=3.0)
    found = with_base_defaults(config(**given), WAN)
    assert {name: getattr(found, name) for name in given} == given and found.data_fps is None
    assert with_base_defaults(config(data_fps=4.0), MODELSCOPE).frame_interval is None


def test_what_decides_the_students_path():
    assert student_settings(config(), WAN) == {"shift": 5.0}
    assert student_settings(config(shift=8.0), WAN) == {"shift": 8.0}
    assert student_settings(config(sigma_data=1.0), MODELSCOPE) == {"timestep_scaling": 4.0, "sigma_data": 1.0}


@pytest.mark.parametrize(
    ("flags", "base", "message"),
    [
        (dict(shift=5.0), MODELSCOPE, "--shift 5 has no effect on a modelscope, .*; it has --timestep_scaling, --sig"),
        (dict(timestep_scaling=10.0), WAN, "--timestep_scaling 10 has no effect on a wan, .*; it has --shift"),
        (dict(frame_decoder="image"), MODELSCOPE, "--frame_decoder image is none that a modelscope has; .*: exact"),
        (dict(num_inference_steps=50), WAN, r"--num_inference_steps \(50\) must not exceed --num_solver_steps \(48\)"),
    ],
)
def test_a_flag_without_a_meaning_is_refused(flags, base, message):
    with pytest.raises(ValueError, match=message):
        with_base_defaults(config(**flags), base)


def test_every_way_to_decode_frames_is_a_choice():
    assert FRAME_DECODERS == WAN.frame_decoders
