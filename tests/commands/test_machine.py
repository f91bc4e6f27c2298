"""What flags do for memory and time, on a pipeline that says what was done to it."""

import argparse
import ast
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from diffusers_mcm import commands
from diffusers_mcm.commands.machine import add_machine, check_offload, join_processes, spend_less


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_machine(parser)
    return parser.parse_args(flags)


def asked_of(*flags, any_frames=True):
    """The methods of a pipeline, and of its parts, that the flags call."""
    pipeline = mock.MagicMock()
    pipeline.base_model.decodes_any_frames, pipeline.base_model.name = any_frames, "wan"
    pipeline.denoisers = {"transformer": pipeline.transformer}
    spend_less(pipeline, parsed(*flags), "cuda")
    return [call[0] for call in pipeline.mock_calls]


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ([], ["to"]),
        (["--vae_slicing"], ["vae.enable_slicing", "to"]),
        (["--vae_tiling"], ["vae.enable_tiling", "to"]),
        (["--offload", "model"], ["enable_model_cpu_offload"]),
        (["--offload", "sequential"], ["enable_sequential_cpu_offload"]),
        (["--compile"], ["to", "transformer.compile"]),
    ],
)
def test_each_flag_does_one_thing(flags, calls):
    assert asked_of(*flags) == calls


@pytest.mark.parametrize("flags", [["--vae_slicing"], ["--decode_chunk_size", "4"]])
def test_what_does_nothing_for_a_wan_is_refused(flags):
    assert asked_of(*flags)
    with pytest.raises(ValueError, match="expected neither --vae_slicing nor --decode_chunk_size for a wan"):
        asked_of(*flags, any_frames=False)
    assert asked_of("--vae_tiling", any_frames=False) == ["vae.enable_tiling", "to"]


def test_nothing_can_be_kept_away_from_the_cpu():
    with pytest.raises(ValueError, match="expected an accelerator .* for --offload model, got the cpu"):
        check_offload("model", "cpu")
    check_offload("none", "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_wait_for_each_other_as_long_as_their_shares_may_differ(device):
    with mock.patch("accelerate.PartialState") as state:
        assert join_processes(device) is state.return_value
    assert state.call_args.kwargs == {"cpu": device == "cpu", "timeout": timedelta(days=1)}


def test_no_command_joins_the_others_in_another_way():
    """Without a timeout of its own, that is: torch's ends them after 10 minutes."""
    found = {
        path.name
        for path in Path(commands.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "PartialState"
    }
    assert found == {"machine.py"}
