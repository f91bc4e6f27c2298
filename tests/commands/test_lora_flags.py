"""The flags by which commands find a LoRA or a pair."""

import argparse

import pytest

from diffusers_mcm.commands.lora_flags import add_place, one_or_pair, take_place


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_place(parser.add_argument, "SOURCE")
    arguments = parser.parse_args(flags)
    take_place(arguments)
    return vars(arguments)


def test_a_place_is_one_or_two():
    nothing = dict(subfolder=None, weight_name=None, revision=None)
    assert parsed() == nothing
    assert parsed("--subfolder", "a", "--revision", "v1") == nothing | dict(subfolder="a", revision="v1")
    assert parsed("--weight_name", "high", "--weight_name", "low") == nothing | dict(weight_name=["high", "low"])


@pytest.mark.parametrize("flag", ["--subfolder", "--weight_name"])
def test_three_are_too_many(flag):
    with pytest.raises(ValueError, match=f"expected {flag} once, or twice for two experts, got it 3 times"):
        parsed(flag, "a", flag, "b", flag, "c")
    with pytest.raises(ValueError, match="expected --lora once"):
        one_or_pair(["a"] * 3, "--lora")
