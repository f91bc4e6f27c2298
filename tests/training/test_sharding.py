import os
import re
import shutil
from functools import partial

import pytest
from accelerate.state import AcceleratorState

from diffusers_mcm.training.acceleration import build_accelerator, with_accelerate_settings
from diffusers_mcm.training.checkpoint import load_checkpoint
from diffusers_mcm.training.loop import Trainer

from .test_distributed import DOUBLE, ROOT, train_in_two_processes
from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flatten, tiny_config

FSDP = ("accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml"))
FSDP += ("--num_processes", "2", "--mixed_precision", "no")


def test_frozen_weights_that_are_split_change_nothing(world, tmp_path):
    """In float64, to 1e-9: no clip of one process starts from its own sample, some of the other's do."""
    with double_precision():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=2, **SPLIT))
        start = flatten(one.state())
        one.train()
    options = dict(train_batch_size=1, checkpointing_steps=1, validation_prompts=(CAPTIONS[0],), validation_steps=1)
    two = tiny_config(world, tmp_path / "two", **options, **SPLIT)
    said = train_in_two_processes(two, tmp_path, DOUBLE, launch=FSDP)
    here, whole = re.search(r"are split: (\d+) kB of (\d+) kB are here", said).groups()
    assert int(here) < 0.6 * int(whole)
    state = load_checkpoint(tmp_path / "two" / "checkpoint-2")
    assert_same_training(start, flatten(one.state()), flatten(state), double=True)
    assert (tmp_path / "two/validation/step-000002/00.mp4").is_file()
    with double_precision():  # a checkpoint is whole: one process goes on with it
        shutil.rmtree(tmp_path / "two" / "checkpoint-2")
        options |= dict(train_batch_size=2, resume_from_checkpoint="latest")
        AcceleratorState._reset_state(reset_partial_state=True)
        again = Trainer(tiny_config(world, tmp_path / "two", **options, **SPLIT))
        assert again.step == 1
        again.train()
    assert_same_training(start, flatten(one.state()), flatten(again.state()), double=True)


def test_what_of_fsdp_would_be_passed_over_is_refused(world, tmp_path, monkeypatch):
    config = partial(tiny_config, world, tmp_path)
    monkeypatch.setenv("FSDP_VERSION", "2")
    for variable, message in (
        ("FSDP_OFFLOAD_PARAMS", "--fsdp_offload_params is not supported: leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "give --gradient_checkpointing"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            patch.setenv(variable, "true")
            with_accelerate_settings(config())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--fuse_lora changes weights, which --fsdp splits"):
        with_accelerate_settings(config(fuse_lora=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    told = with_accelerate_settings(config())
    assert told.fsdp and os.environ["ACCELERATE_USE_FSDP"] == "false"
    with pytest.raises(ValueError, match="--fsdp splits the frozen weights among processes, and there is only one"):
        build_accelerator(told)
