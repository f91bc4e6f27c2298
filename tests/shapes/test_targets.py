import math

import numpy as np
import pytest

from diffusers_mcm.shapes.targets import checks

GOOD = {  # every target exactly met, or just so
    "teacher-ddim-50": {"all_right": 0.85, "watermark_seen": 0.8, "sharpness": 0.3, "flicker": 0.02}
    | {"displacement": 0.02, "spread": 0.1},
    "teacher-ddim-4": {"all_right": 0.5, "flicker": 0.02},
    "teacher-dpm-4": {"all_right": 0.6},
    **{
        f"mcm-{steps}": {"all_right": 0.95 if steps > 1 else 0.8, "watermark_seen": 0.1, "sharpness": 0.41}
        | {"identity_kept": 0.9, "wobble": 0.055, "flicker": 0.02, "displacement": 0.0191, "spread": 0.0801}
        for steps in (1, 2, 4, 8)
    },
    **{f"lcm-{steps}": {"all_right": 0.7} for steps in (1, 2, 4)},
    "truth-clean": {"sharpness": 0.5},
}
SECONDS = {1: {"teacher-ddim-50": 12.0, "mcm-4": 1.0}, 16: {"teacher-ddim-50": 6.0, "mcm-4": 0.5}}


def reached(changes=None, seconds=SECONDS, with_lcm=True):
    """Name of each check -> whether it is reached, with some measurements changed."""
    measured = {method: values | (changes or {}).get(method, {}) for method, values in GOOD.items()}
    found = checks(lambda method, metric: np.full(11, measured[method][metric]), seconds, with_lcm)
    return {check.name: check.reached for check in found}


def test_checks_hold_where_every_target_is_met():
    assert set(reached().values()) == {True}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"teacher-ddim-50": {"all_right": 0.84}}, "teacher, DDIM 50: all right"),
        ({"mcm-4": {"all_right": 0.94}}, "MCM 4: all right"),
        ({"mcm-1": {"all_right": 0.79}}, "MCM 1: all right"),
        ({"teacher-dpm-4": {"all_right": 0.91}}, "MCM 4: failures against"),
        ({"teacher-ddim-50": {"all_right": 0.96}}, "MCM 1 less teacher"),
        ({"lcm-2": {"all_right": 0.96}}, "MCM 2 less LCM 2"),
        ({"mcm-4": {"identity_kept": 0.89}}, "MCM 4: identity kept"),
        ({"mcm-4": {"wobble": 0.056}}, "MCM 4: wobble"),
        ({"teacher-ddim-4": {"flicker": 0.019}}, "MCM 4: flicker / DDIM 4's"),
        *(
            (
                {"teacher-ddim-50": {"flicker": 0.03}, method: {"flicker": 0.0261}},
                "MCM: flicker / DDIM 4's, worst of 1, 2",
            )
            for method in ("mcm-1", "mcm-2")
        ),
        ({"mcm-1": {"flicker": 0.021}}, "MCM: flicker / teacher's"),
        ({"mcm-8": {"displacement": 0.0189}}, "MCM: displacement per frame / teacher's, least of"),
        ({"mcm-8": {"displacement": 0.0221}}, "MCM: displacement per frame / teacher's, most of"),
        ({"mcm-8": {"spread": 0.0799}}, "MCM: spread"),
        ({"teacher-ddim-50": {"watermark_seen": 0.79}}, "teacher: watermark seen"),
        ({"mcm-8": {"watermark_seen": 0.11}}, "MCM: watermark seen"),
        ({"mcm-2": {"sharpness": 0.39}}, "MCM: sharpness off clean frames'"),
        ({"mcm-2": {"sharpness": 0.61}}, "MCM: sharpness off clean frames'"),
        ({"teacher-ddim-50": {"sharpness": 0.42}}, "MCM: sharpness / teacher's"),
    ],
)
def test_each_check_fails_alone(changes, name):
    missed = [check for check, good in reached(changes).items() if not good]
    assert len(missed) == 1 and missed[0].startswith(name)


def test_four_steps_that_fall_behind_the_teacher_miss_their_own_target_too():
    missed = [check for check, good in reached({"mcm-4": {"all_right": 0.79}}).items() if not good]
    assert missed[0] == "MCM 4: all right, %"
    assert "MCM 4 less teacher: all right, points" in missed


def test_time_and_missing_control():
    for batch_size, how in ((1, "one video at a time"), (16, "16 videos at once")):
        seconds = SECONDS | {batch_size: {"teacher-ddim-50": 11.9, "mcm-4": 1.0}}
        missed = [check for check, good in reached(seconds=seconds).items() if not good]
        assert missed == [f"MCM 4 against teacher DDIM 50, {how}: times faster"]
    without = reached(with_lcm=False)
    assert [without[f"MCM {steps} less LCM {steps}: all right, points"] for steps in (1, 2, 4)] == [None] * 3


def test_what_cannot_be_known_is_not_reached():
    assert (
        reached({"mcm-1": {"spread": math.nan}})["MCM: spread of positions / teacher's, worst of 1, 2, 4, 8 steps"]
        is None
    )
