import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_mcm.training.checkpoint import STATE_FILE, load_checkpoint
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.loop import Trainer

from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flags_of, flatten, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_mcm_distill.py"
DOUBLE = Path(__file__).with_name("train_in_double.py")


def add_broken(videos: Path) -> Path:
    with (videos / "metadata.csv").open("a") as rows:
        for number in range(4):
            (videos / f"broken-{number}.mp4").write_bytes(b"not a video")
            rows.write(f"broken-{number}.mp4,a red ring growing on a black background\n")
    return videos


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FSDP = ("accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml"))


def train_in_two_processes(
    config: TrainingConfig, folder: Path, *wrapper: Path, launch: Sequence[str] = TORCHRUN
) -> str:
    """Run the script over gloo in `folder`, by a script around it if there is one; what it said on stderr."""
    launcher = [sys.executable, "-m", *launch]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, *map(str, wrapper), str(SCRIPT), *flags_of(config)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_two_processes_equal_one_big_batch(world, tmp_path, double):
    """The script, run in two processes over gloo from another directory, against one process with all samples.

    Four clips are broken: each process meets some of them, one of them both, and each is counted once. In float64 the
    two fuse the LoRA, which the one does not. In float32 the two have as many worker processes as is usual.
    """
    world = world | {"video_data": str(add_broken(Path(shutil.copytree(world["video_data"], tmp_path / "videos"))))}
    with double_precision() if double else nullcontext():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=4, **SPLIT))
        start = flatten(one.state())
        one.train()
    options = dict(train_batch_size=2, checkpointing_steps=2, fuse_lora=double)
    options |= {} if double else dict(dataloader_num_workers=None)
    two = tiny_config(world, tmp_path / "two", **options, **SPLIT)
    said = train_in_two_processes(two, tmp_path, *([DOUBLE] if double else []))
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double)
    assert (tmp_path / "two" / "pytorch_lora_weights.safetensors").is_file()
    assert "4 items of the data could not be used" in said
    assert "broken-0.mp4, " in said.rpartition("could not be used")[2]  # with their names


def test_frozen_weights_that_are_split_change_nothing(world, tmp_path):
    """In float64, to 1e-9: no clip of one process starts from its own sample, some of the other's do."""
    with double_precision():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=2, **SPLIT))
        start = flatten(one.state())
        one.train()
    options = dict(train_batch_size=1, checkpointing_steps=1, validation_prompts=(CAPTIONS[0],), validation_steps=1)
    two = tiny_config(world, tmp_path / "two", **options, **SPLIT)
    launch = (*FSDP, "--num_processes", "2", "--mixed_precision", "no")
    said = train_in_two_processes(two, tmp_path, DOUBLE, launch=launch)
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


def test_so_do_two_processes_with_animatediff(animatediff, tmp_path):
    one = Trainer(tiny_config(animatediff, tmp_path / "one", train_batch_size=2, **SPLIT))
    start = flatten(one.state())
    one.train()
    two = tiny_config(animatediff, tmp_path / "two", train_batch_size=1, checkpointing_steps=2, **SPLIT)
    train_in_two_processes(two, tmp_path)
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=False)
