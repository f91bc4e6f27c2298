import argparse
import os
import random
import time
from pathlib import Path

import kill
import pytest
import torch

from diffusers_mcm.training.checkpoint import save_checkpoint
from diffusers_mcm.training.config import TrainingConfig


def test_one_bit_and_one_missing_number_are_differences():
    one = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert kill.differences(one, {name: tensor.clone() for name, tensor in one.items()}) == []
    other = {"a": torch.tensor([1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))]), "c": torch.zeros(1)}
    assert set(kill.differences(one, other)) == {"a", "b", "c"}


def test_a_run_that_is_killed_goes_on_until_it_is_compared(tmp_path, monkeypatch):
    """With a training that counts to three, of which each process is a real one."""

    def train(config: TrainingConfig) -> None:
        folder = Path(config.output_dir)
        for step in (1, 2, 3):
            if os.environ["RANK"] == "0" and not (folder / f"checkpoint-{step}").is_dir():
                save_checkpoint(folder, step, {"weights": torch.full((2,), float(step))}, lambda path: None)
            time.sleep(0.05)

    monkeypatch.setattr(kill, "train", train)
    monkeypatch.setattr(kill, "FILES", ())
    monkeypatch.setattr(kill, "run_config", lambda world, folder: _config(folder))
    whole, seconds = kill.undisturbed({}, tmp_path / "whole")
    assert whole["/weights"].tolist() == [3.0, 3.0] and seconds > 0.1
    results = {"kills": 0, "runs": 0, "bitwise": 0, "late": 0, "longest end, s": 0.0, "victims": {}, "unlike": []}
    options = argparse.Namespace(seed=0, kills=2, output=tmp_path / "kill.json")
    for run in range(20):
        if results["kills"] < options.kills:
            kill.one_run({}, tmp_path / f"run-{run}", whole, seconds, results, options)
    assert results["kills"] >= 2 and results["runs"] == results["bitwise"] > 0
    assert kill.read_results(options.output)["kills"] >= 2
    other = results | {"kills": options.kills, "unlike": []}  # nobody is killed any more
    kill.one_run({}, tmp_path / "other", whole | {"/weights": torch.zeros(2)}, seconds, other, options)
    assert other["unlike"] == ["/weights"] and other["bitwise"] == results["bitwise"]


def _config(folder):
    folder.mkdir(exist_ok=True)
    return TrainingConfig(pretrained_teacher_model="x", video_data="x", output_dir=str(folder))


def test_a_process_that_does_not_end_by_itself_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "LIMIT", 0.2)
    monkeypatch.setattr(kill, "train", lambda config: time.sleep(60))
    processes = kill.start(_config(tmp_path / "run"), tmp_path / "log")
    killed, took = kill.kill(processes, (), "the main process", random.Random(0))
    assert killed and took == float("inf")


def test_one_that_has_ended_is_not_waited_for_again(tmp_path, monkeypatch):
    """Of two processes one is through when the other is to be killed, or the very one that is through."""
    monkeypatch.setattr(kill, "train", lambda config: time.sleep(60 if os.environ["RANK"] == "1" else 0))
    for victim, met in (("the main process", False), ("the other process", True), ("everything", True)):
        processes = kill.start(_config(tmp_path / "run"), tmp_path / "log")
        codes = kill.wait(processes[:1], 30)
        assert codes == {processes[0]: 0}
        killed, took = kill.kill(processes, codes, victim, random.Random(0))
        assert killed is met and took < kill.LIMIT


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path, monkeypatch):
    def train(config: TrainingConfig) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(kill, "train", train)
    monkeypatch.setattr(kill, "run_config", lambda world, folder: _config(folder))
    results, options = {"kills": 0, "runs": 0}, argparse.Namespace(seed=0, kills=0, output=tmp_path / "kill.json")
    with pytest.raises(RuntimeError, match="could not be gone on with"):
        kill.one_run({}, tmp_path / "run", {}, 1.0, results, options)
