import os
import subprocess
import sys
from pathlib import Path

import torch

from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import train

from .world import SPLIT, assert_same_training, flags_of, flatten, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_mcm_distill.py"


def test_two_processes_equal_one_big_batch(world, tmp_path):
    """The script, run in two processes over gloo from another directory, against one process with all samples."""
    options = SPLIT | dict(checkpointing_steps=2)
    train(tiny_config(world, tmp_path / "one", train_batch_size=4, **options))
    two = tiny_config(world, tmp_path / "two", train_batch_size=2, **options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *flags_of(two)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    states = [torch.load(tmp_path / name / "checkpoint-2" / STATE_FILE, weights_only=True) for name in ("one", "two")]
    assert_same_training(*map(flatten, states))
    assert (tmp_path / "two" / "pytorch_lora_weights.safetensors").is_file()
