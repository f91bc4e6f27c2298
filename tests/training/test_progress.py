import logging
import sys
import time

import torch

from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.progress import Clock, Lap, ProgressBar, peak_memory

from .world import tiny_config


def test_what_is_waited_for_data_is_counted_and_nothing_else(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def batches():
        for number in range(3):
            now[0] += 1  # to load
            yield number

    clock, laps = Clock(), []
    for _ in clock.waiting(batches()):
        now[0] += 3  # to train
        laps.append(clock.lap())
    assert laps == [Lap(4.0, 1.0)] * 3 and laps[0].share == 0.25 and Lap(0.0, 0.0).share == 0


def test_the_bar_shows_the_losses_of_its_own_step(capsys):
    with ProgressBar(0, 5, 4, torch.device("cpu"), shown=True) as bar:
        bar.bar.mininterval = 0
        for step in (1, 2):
            bar.show({"loss": float(step), "student_grad_norm": 7.0}, Lap(2.0, 0.5))
    shown = [line for line in capsys.readouterr().err.split("\r") if "loss=" in line]
    assert shown and all(("loss=1" in line) == ("1/5" in line) for line in shown)
    assert "clips/s=2, waiting=25%, peak=" in shown[-1] and "grad_norm" not in shown[-1]


def test_a_pipe_without_a_reader_ends_the_bar_only(capsys, monkeypatch):
    with ProgressBar(0, 5, 4, torch.device("cpu"), shown=True) as bar:
        bar.bar.mininterval = 0

        def broken(*_):
            raise BrokenPipeError

        monkeypatch.setattr(bar.bar, "update", broken)
        bar.show({"loss": 1.0}, Lap(1.0, 0.0))
        assert bar.bar.disable
    hidden = ProgressBar(0, 5, 4, torch.device("cpu"), shown=False)
    hidden.show({"loss": 1.0}, Lap(1.0, 0.0))
    assert not capsys.readouterr().err.endswith("1/5")


def test_the_peak_of_a_process_is_that_of_all_it_had():
    before = peak_memory(torch.device("cpu"))
    held = bytearray(before)  # twice as much
    held[::4096] = bytes(len(held[::4096]))
    time.sleep(0)
    assert peak_memory(torch.device("cpu")) > 1.5 * before > 2**20


def test_what_is_logged_beside_the_bar_stands_on_a_line_of_its_own(world, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("the disk is full")

    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(root, "handlers", [handler])
    trainer = Trainer(tiny_config(world, tmp_path, lambda_adv=0.0, image_data=None, checkpointing_steps=1))
    monkeypatch.setattr(trainer.keeper, "save", full)
    trainer.train()
    said = capsys.readouterr().err
    assert [line[:40] for line in said.replace("\r", "\n").splitlines() if "the disk is full" in line] == [
        f"No checkpoint of step {step} was written: the disk is full"[:40] for step in (1, 2)
    ]
    assert root.handlers == [handler]
