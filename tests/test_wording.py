import pytest

from diffusers_mcm.wording import first_names, readable


@pytest.mark.parametrize(
    "names, most, told",
    [([], 3, ""), (["a"], 3, "a"), (["c", "a", "b"], 3, "c, a, b"), (["a", "b", "c"], 2, "a, b, …")],
)
def test_first_names_says_whether_there_are_more(names, most, told):
    assert first_names(iter(names), most) == told


@pytest.mark.parametrize(
    "size, told", [(0, "0 bytes"), (999, "999 bytes"), (1234567, "1.23 MB"), (44.5e9, "44.5 GB"), (3e15, "3e+03 TB")]
)
def test_readable_takes_the_largest_unit_that_fits(size, told):
    assert readable(size) == told
