"""What is recorded of a folder of samples."""

import pytest

from diffusers_mcm.evaluation.distances import Interval
from diffusers_mcm.evaluation.records import Difference, steps_in_name


@pytest.mark.parametrize(
    "name, steps",
    [("lcm4", 4), ("mcm-8-steps", 8), ("ddim_1_step", 1), ("8", 8), ("lora-r32", None), ("v2", None), ("mcm", None),
     ("run-20260101", None), ("mcm0", None), ("lcm-4", 4), ("a steps", None), ("lora-r32-4steps", 4)],
)  # fmt: skip
def test_the_steps_at_the_end_of_a_name(name, steps):
    assert steps_in_name(name) == steps


def test_a_difference_is_clear_where_its_interval_excludes_0():
    intervals = [(2.0, 1.0, 3.0), (-2.0, -3.0, -1.0), (0.5, -1.0, 2.0), (1.0, 0.0, 2.0)]
    found = [Difference("a", "b", "clipsim", Interval(*interval), 200).is_clear for interval in intervals]
    assert found == [True, True, False, False]
