import json
import math

import numpy as np
import pytest

from diffusers_mcm.shapes import figures
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.figures import Study, checks
from diffusers_mcm.shapes.methods import LCM_METHODS, MCM_METHODS, TEACHER_METHODS, Networks

GOOD = {  # every target exactly met, or just so
    "teacher-ddim-50": {"all_right": 0.85, "watermark_seen": 0.8, "sharpness": 0.3, "flicker": 0.02}
    | {"displacement": 0.02, "spread": 0.1},
    "teacher-ddim-4": {"all_right": 0.5},
    "teacher-dpm-4": {"all_right": 0.6},
    **{
        f"mcm-{steps}": {"all_right": 0.8 if steps > 1 else 0.7001, "watermark_seen": 0.1, "sharpness": 0.41}
        | {"flicker": 0.02, "displacement": 0.0161, "spread": 0.0701}
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
        ({"mcm-4": {"all_right": 0.79}, "teacher-dpm-4": {"all_right": 0.5}}, "MCM 4 less teacher"),
        ({"teacher-dpm-4": {"all_right": 0.61}}, "MCM 4: failures against"),
        ({"mcm-1": {"all_right": 0.69}, "lcm-1": {"all_right": 0.6}}, "MCM 1 less teacher"),
        ({"lcm-2": {"all_right": 0.81}}, "MCM 2 less LCM 2"),
        ({"teacher-ddim-50": {"watermark_seen": 0.79}}, "teacher: watermark seen"),
        ({"mcm-8": {"watermark_seen": 0.11}}, "MCM: watermark seen"),
        ({"mcm-2": {"sharpness": 0.39}}, "MCM: sharpness off clean frames'"),
        ({"mcm-2": {"sharpness": 0.61}}, "MCM: sharpness off clean frames'"),
        ({"teacher-ddim-50": {"sharpness": 0.42}}, "MCM: sharpness / teacher's"),
        ({"mcm-1": {"flicker": 0.021}}, "MCM: flicker"),
        ({"mcm-8": {"displacement": 0.0159}}, "MCM: displacement"),
        ({"mcm-8": {"spread": 0.0699}}, "MCM: spread"),
    ],
)
def test_each_check_fails_alone(changes, name):
    missed = [check for check, good in reached(changes).items() if not good]
    assert len(missed) == 1 and missed[0].startswith(name)


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


class Untouchable:
    """Networks that may be asked for nothing."""


def test_study_keeps_what_it_read(tmp_path):
    captions = held_out_captions()[:3]
    first = Study(Untouchable(), tmp_path, batch_size=2).truth("truth-clean", captions, [0, 5])
    assert [len(row) for row in first] == [2, 2, 2]
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace('"sharpness": 0.', '"sharpness": 7.'))
    again = Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0, 5])
    assert all(r["sharpness"] > 7 for row in again for r in row)
    other_seeds = Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0, 6])
    assert all(r["sharpness"] < 1 for row in other_seeds for r in row)


def test_best_guidance_prefers_right_then_small(tmp_path, monkeypatch):
    shares = {1.0: 0.0, 2.0: 1.0, 4.0: 1.0, 8.0: 0.0}
    captions = held_out_captions()[:2]

    def readings(self, method, captions, seeds):
        wrong = {} if shares[method.guidance] else {"colour": None}
        numbers = {"watermark_seen": 0, "sharpness": 0, "flicker": 0, "displacement": 0, "position": [0, 0]}
        return [[caption._asdict() | numbers | wrong for _ in seeds] for caption in captions]

    monkeypatch.setattr(Study, "readings", readings)
    best, found = Study(Untouchable(), tmp_path).best_guidance(TEACHER_METHODS[0], [8.0, 4.0, 2.0, 1.0], captions)
    assert (best, found) == (2.0, shares)


def test_a_tiny_run_end_to_end_and_again_from_what_it_kept(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "TEACHER_METHODS", tuple(m._replace(steps=2) for m in TEACHER_METHODS))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures -->\n<!-- /figures -->\n")
    command = ["--teacher", tiny_base, "--mcm", tiny_base, "--lcm", tiny_base, "--output", str(tmp_path / "out")]
    command += ["--captions", "2", "--seeds", "2", "--guidances", "1", "3", "--search_captions", "1"]
    command += ["--timing_runs", "1", "--batch_size", "4"]
    command += ["--device", "cpu", "--readme", str(readme)]
    figures.main(command)
    results = json.loads((tmp_path / "out" / "figures.json").read_text())
    names = [method.name for method in (*TEACHER_METHODS, *MCM_METHODS, *LCM_METHODS)]
    assert set(results["methods"]) == {*names, "truth-video", "truth-clean"}
    assert results["methods"]["truth-clean"]["all_right"] == [1, 1, 1]
    assert all(min(results["methods"][name]["seconds"][size] for size in "14") > 0 for name in names)
    assert set(results["guidance_search"]["teacher-ddim-50"]) == {"1", "3"}
    assert len(results["checks"]) == 16
    assert "| rendered truth, clean |" in readme.read_text() and "≥ 12" in readme.read_text()
    capsys.readouterr()

    monkeypatch.setattr(Networks, "sample", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(figures, "time_methods", lambda *_: dict.fromkeys(names, 1.0))
    figures.main([*command, "--checks"])
    again = json.loads((tmp_path / "out" / "figures.json").read_text())
    for name, method in results["methods"].items():
        assert again["methods"][name] | {"seconds": None} == method | {"seconds": None}
    assert "| target | measured | reached |" in capsys.readouterr().out


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="expected --seeds of at least 1, got 0"):
        figures.main(["--seeds", "0"])
