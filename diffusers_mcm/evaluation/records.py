"""What is recorded of one folder of samples, and of two of them beside each other."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .distances import Interval

TRAILING_STEPS = re.compile(r"[-_ ]?(\d+)(?:[-_ ]?steps?)?$")  # `lcm4`, `mcm-8-steps`
_LETTER = re.compile(r"(^|[\W_])[^\W\d_]$")  # `lora-r32` and `v2` say something else
MOST_STEPS = 1000  # as many as the noise schedules have


def steps_in_name(name: str) -> int | None:
    """The number of steps at the end of a name, such as `lcm4` or `mcm-8-steps`; None where there is none."""
    found = TRAILING_STEPS.search(name)
    if found is None or (_LETTER.search(name[: found.start()]) and found[0] == found[1]):
        return None
    return int(found[1]) if 0 < int(found[1]) <= MOST_STEPS else None


@dataclass(frozen=True)
class Method:
    """What was found of one folder of samples.

    Attributes:
        source: the folder.
        num_videos: how many were read; `skipped` names the others, with the reason, but for those that no table names.
        num_captions: how many different ones.
        steps: of sampling, where the samples or the folder's name say it.
        settings: what all samples say of how they were made.
        values: column's key -> score, None where there is none.
        steps_by_name: whether the steps are but the number at the end of the name.
        fps: the lowest and the highest rate of the clips that were compared; None where files do not say it.
        seeds: those of the samples, in words; None where they are not known.
        versions: of the packages that read and measured the videos.
    """

    source: str
    num_videos: int
    num_captions: int
    skipped: Mapping[str, str]
    steps: int | None
    settings: Mapping[str, Any]
    values: Mapping[str, float | None]
    steps_by_name: bool = False
    fps: Sequence[float] | None = None
    seeds: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One method less another in one column, with the paired 95 % interval over captions from so many `resamples`."""

    method: str
    less: str
    column: str
    interval: Interval
    resamples: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval.low > 0 or self.interval.high < 0
