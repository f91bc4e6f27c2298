"""Runs the blocks of code in a document from top to bottom, as a reader would who copies them."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

from diffusers_mcm.cli import main

ROOT = Path(__file__).parents[1]
# Command -> why a test cannot run it. They are checked in other ways, or by whoever runs the tests.
NOT_RUN = {
    "make demo": "installs",
    "make test": "installs, and runs these tests",
    "pip install -c constraints.txt -e .[train]": "installs",
    "pip install -c constraints.txt -e .[eval]": "installs",
    "hf auth login": "asks for a token",
}
# What is added to a command, so that it takes a moment and not a day.
SHORTER = {
    "shapes build": ["--videos", "4", "--images", "4", "--num_frames", "4"],
    "evaluate --reference": ["--num_videos", "2"],
    "evaluate out/mcm4": shlex.split(
        "--num_videos 2 --num_frames 4 --metrics clipsim fid --clip mcm-shapes-clip --frame_network"
        " dinov2=mcm-shapes-features"
    ),
    "train_mcm_distill": shlex.split(
        "--max_train_steps 1 --lr_warmup_steps 0 --train_batch_size 1 --num_frames 4 --frame_interval 1 --lora_rank 2"
        " --checkpointing_steps 0 --report_to none --mixed_precision no --gradient_accumulation_steps 1"
        " --dataloader_num_workers 0"
    ),
}


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_document(document: str) -> tuple[list[dict], set[str]]:
    """Run it in the working directory. What was in Python's namespace after each block, and the commands left out."""
    namespace, seen, left_out = {}, [], set()
    for language, text in blocks(document):
        if language == "python":
            exec(compile(text, document, "exec"), namespace)
            seen.append(dict(namespace))
            continue
        assert language == "bash", language
        for words in commands(text):
            if " ".join(words) in NOT_RUN:
                left_out.add(" ".join(words))
            else:
                run(words)
    return seen, left_out


def run(words: list[str]) -> None:
    """One command, in this process: importing torch takes longer than all else."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it is meant to be kept for the life of a process
    program, *arguments = words
    if Path(program).name == "diffusers-mcm":
        assert main([*arguments, *SHORTER.get(" ".join(arguments[:2]), [])]) == 0, words
    elif words[:2] == ["accelerate", "launch"]:
        run_script(*launched(arguments[1:]))
    else:
        assert program == "sh", f"say in {__name__} how to run {words}"
        for script in handed_on(words):
            run_script(*script)
    AcceleratorState._reset_state(reset_partial_state=True)


def run_script(path: str, *arguments: str) -> None:
    """A Python script with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments, *SHORTER.get(Path(path).stem, [])])
        runpy.run_path(path, run_name="__main__")


def launched(arguments: list[str]) -> list[str]:
    """The script with its arguments, of those of `accelerate launch`, whose configuration file must be one."""
    launch = launch_command_parser().parse_args(arguments)
    if launch.config_file is not None:
        load_config_from_file(launch.config_file)
    return [launch.training_script, *launch.training_script_args]


def handed_on(words: list[str]) -> list[list[str]]:
    """The Python scripts, each with its arguments, that a shell script hands to a launcher, in order."""
    return [call[next(n for n, word in enumerate(call) if word.endswith(".py")) :] for call in launches(words)]


def launches(words: list[str], **environment: str) -> list[list[str]]:
    """The arguments of each `torchrun` or `accelerate` that a shell script calls."""
    folder = Path("stand_in")
    folder.mkdir(exist_ok=True)
    for launcher in ("torchrun", "accelerate"):
        (folder / launcher).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" ''\n")
        (folder / launcher).chmod(0o755)
    environment["PATH"] = f"{folder.resolve()}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return [call.splitlines() for call in told.stdout.strip().split("\n\n")]
