"""The targets of the project in the shapes world, each beside what was measured."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from .methods import LCM_METHODS, MCM_METHODS
from .scores import METRICS, Metric, interval

Draws = Callable[[str, str], np.ndarray]  # (method, metric) -> what `scores.estimates` gives
_PERCENT, _RATIO = Metric("", percent=True), Metric("", digits=3)
_STEPS = "1, 2, 4, 8 steps"
_WORST = f"worst of {_STEPS}"


class Check(NamedTuple):
    """A target beside what was measured; `reached` is None where nothing was."""

    name: str
    target: str
    measured: str
    reached: bool | None


def checks(draws: Draws, seconds: Mapping[int, Mapping[str, float]], with_lcm: bool) -> list[Check]:
    """Every target of the project beside what was measured; ratios and differences are taken within each resample.

    Args:
        draws: (method, metric) -> `estimates`.
        seconds: how many videos are made at once -> method -> seconds per video.
    """
    return [
        *_right_checks(draws),
        *(_against_lcm(method.steps, draws if with_lcm else None) for method in LCM_METHODS),
        *_steadiness_checks(draws),
        *_appearance_checks(draws),
        *(_faster(size, times["teacher-ddim-50"] / times["mcm-4"]) for size, times in seconds.items()),
    ]


def _mcm(draws: Draws, metric: str, reference: str | None = None) -> np.ndarray:
    """(4, 1 + resamples): one row per number of steps, divided by the reference's if there is one."""
    values = np.stack([draws(method.name, metric) for method in MCM_METHODS])
    return values if reference is None else values / draws(reference, metric)


def _right_checks(draws: Draws) -> list[Check]:
    """That the videos show what they should: in themselves, and beside the teacher's."""

    def right(method: str) -> np.ndarray:
        return draws(method, "all_right")

    of_teacher, few = right("teacher-ddim-50"), 1 - np.maximum(right("teacher-ddim-4"), right("teacher-dpm-4"))
    failures = 1 - right("mcm-4")
    less = {steps: right(f"mcm-{steps}") - of_teacher for steps in (1, 4)}
    return [
        _row("teacher, DDIM 50: all right, %", "≥ 85", lambda x: x >= 0.85, of_teacher, _PERCENT),
        _row("MCM 4: all right, %", "≥ 95", lambda x: x >= 0.95, right("mcm-4"), _PERCENT),
        _row("MCM 1: all right, %", "≥ 80", lambda x: x >= 0.8, right("mcm-1"), _PERCENT),
        _row("MCM 4 less teacher: all right, points", "≥ −5", lambda x: x >= -0.05, less[4], _PERCENT),
        Check(
            "MCM 4: failures against the better of DDIM 4 and DPM++ 4, %",
            "at most half",
            f"{100 * failures[0]:.1f} against {100 * few[0]:.1f}",
            bool(round(failures[0] - few[0] / 2, 9) <= 0),
        ),
        _row("MCM 1 less teacher: all right, points", "≥ −15", lambda x: x >= -0.15, less[1], _PERCENT),
    ]


def _steadiness_checks(draws: Draws) -> list[Check]:
    """That a shape stays itself and nothing flickers, and that this is not bought with motion."""
    teacher, speed = "teacher-ddim-50", "displacement per frame / teacher's"
    of_few = {steps: draws(f"mcm-{steps}", "flicker") / draws("teacher-ddim-4", "flicker") for steps in (1, 2, 4)}
    speeds = _mcm(draws, "displacement", teacher)
    flicker, spread = _mcm(draws, "flicker", teacher).max(0), _mcm(draws, "spread", teacher).min(0)
    fewest = np.maximum(of_few[1], of_few[2])
    return [
        _row("MCM 4: identity kept, %", "≥ 90", lambda x: x >= 0.9, draws("mcm-4", "identity_kept"), _PERCENT),
        _row("MCM 4: wobble", "≤ 0.055", lambda x: x <= 0.055, draws("mcm-4", "wobble"), METRICS["wobble"]),
        _row("MCM 4: flicker / DDIM 4's", "≤ 1", lambda x: x <= 1, of_few[4], _RATIO),
        _row("MCM: flicker / DDIM 4's, worst of 1, 2 steps", "≤ 1.3", lambda x: x <= 1.3, fewest, _RATIO),
        _row(f"MCM: flicker / teacher's, {_WORST}", "≤ 1", lambda x: x <= 1, flicker, _RATIO),
        _row(f"MCM: {speed}, least of {_STEPS}", "≥ 0.95", lambda x: x >= 0.95, speeds.min(0), _RATIO),
        _row(f"MCM: {speed}, most of {_STEPS}", "≤ 1.1", lambda x: x <= 1.1, speeds.max(0), _RATIO),
        _row(f"MCM: spread of positions / teacher's, {_WORST}", "≥ 0.8", lambda x: x >= 0.8, spread, _RATIO),
    ]


def _appearance_checks(draws: Draws) -> list[Check]:
    """That the watermark goes and the edges are those of the clean images."""
    teacher = "teacher-ddim-50"
    sharper = _mcm(draws, "sharpness", teacher).min(0)
    off_clean = np.abs(_mcm(draws, "sharpness", "truth-clean") - 1).max(0)
    seen, of_teacher = _mcm(draws, "watermark_seen").max(0), draws(teacher, "watermark_seen")
    return [
        _row("teacher: watermark seen, %", "≥ 80", lambda x: x >= 0.8, of_teacher, _PERCENT),
        _row(f"MCM: watermark seen, %, {_WORST}", "≤ 10", lambda x: x <= 0.1, seen, _PERCENT),
        _row(f"MCM: sharpness / teacher's, {_WORST}", "> 1", lambda x: x > 1, sharper, _RATIO),
        _row(f"MCM: sharpness off clean frames', %, {_WORST}", "≤ 20", lambda x: x <= 0.2, off_clean, _PERCENT),
    ]


def _row(name: str, target: str, reached: Callable[[float], bool], values: np.ndarray, metric: Metric) -> Check:
    """The check of an estimate, measured with its interval."""
    estimate, low, high = interval(values)
    text = f"{metric.format(estimate)} ({metric.format(low)} to {metric.format(high)})"
    return Check(name, target, text, None if math.isnan(estimate) else bool(reached(round(estimate, 9))))


def _against_lcm(steps: int, draws: Draws | None) -> Check:
    name, target = f"MCM {steps} less LCM {steps}: all right, points", "≥ 0"
    if draws is None:
        return Check(name, target, "not measured (no --lcm)", None)
    difference = draws(f"mcm-{steps}", "all_right") - draws(f"lcm-{steps}", "all_right")
    return _row(name, target, lambda x: x >= 0, difference, _PERCENT)


def _faster(batch_size: int, ratio: float) -> Check:
    how = "one video at a time" if batch_size == 1 else f"{batch_size} videos at once"
    return Check(f"MCM 4 against teacher DDIM 50, {how}: times faster", "≥ 12", f"{ratio:.1f}", ratio >= 12)
