import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.loop import Trainer

from .world import SPLIT, assert_same_training, double_precision, flags_of, flatten, tiny_config

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
    two fuse the LoRA, which the one does not, and how the clips change is judged as well. In float32 the two have as
    many worker processes as is usual.
    """
    beyond = dict(lambda_temporal=0.5, lambda_change=0.5) if double else {}
    world = world | {"video_data": str(add_broken(Path(shutil.copytree(world["video_data"], tmp_path / "videos"))))}
    with double_precision() if double else nullcontext():
        one = Trainer(tiny_config(world, tmp_path / "one", train_batch_size=4, **beyond, **SPLIT))
        start = flatten(one.state())
        one.train()
    options = dict(train_batch_size=2, checkpointing_steps=2, fuse_lora=double)
    options |= {} if double else dict(dataloader_num_workers=None)
    two = tiny_config(world, tmp_path / "two", **options, **beyond, **SPLIT)
    said = train_in_two_processes(two, tmp_path, *([DOUBLE] if double else []))
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double)
    assert (tmp_path / "two" / "pytorch_lora_weights.safetensors").is_file()
    assert "4 items of the data could not be used" in said
    assert "broken-0.mp4, " in said.rpartition("could not be used")[2]  # with their names


def test_so_do_two_processes_with_animatediff(animatediff, tmp_path):
    one = Trainer(tiny_config(animatediff, tmp_path / "one", train_batch_size=2, **SPLIT))
    start = flatten(one.state())
    one.train()
    two = tiny_config(animatediff, tmp_path / "two", train_batch_size=1, checkpointing_steps=2, **SPLIT)
    train_in_two_processes(two, tmp_path)
    state = torch.load(tmp_path / "two" / "checkpoint-2" / STATE_FILE, weights_only=True)
    assert_same_training(start, flatten(one.state()), flatten(state), double=False)
