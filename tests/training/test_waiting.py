import logging

import pytest

from diffusers_mcm.training.waiting import Waiting


class Clock:
    """Time goes by as it is told to."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def watch(waits, work=1.0, num_workers=3, tells=True):
    """A run whose batches come after so many seconds each and take `work` seconds to train on."""
    clock = Clock()

    def batches():
        for number, wait in enumerate(waits):
            clock.seconds += wait
            yield number

    waiting = Waiting(num_workers, tells, clock)
    seen = []
    for number in waiting.watch(batches()):
        clock.seconds += work
        seen.append(number)
    assert seen == list(range(len(waits)))
    return waiting


def test_the_share_is_that_of_the_last_batches_without_the_first_of_all():
    assert watch([100.0, 1.0, 0.0]).share == pytest.approx(1 / 3)
    assert watch([100.0] + [3.0] * 10 + [0.25] * 50).share == pytest.approx(0.2)
    assert watch([5.0]).share == watch([]).share == 0


def test_waiting_is_warned_of_once_with_what_to_do(caplog, monkeypatch):
    monkeypatch.setattr("diffusers_mcm.training.waiting.usable_cores", lambda: 8)
    with caplog.at_level(logging.WARNING):
        watch([9.0] + [0.2] * 200)
        assert watch([9.0] + [0.5] * 200, tells=False).share == pytest.approx(1 / 3)
        assert not caplog.messages
        watch([9.0] + [0.5] * 200)
    (message,) = caplog.messages
    told = "33 % of the time the training waits for its data, which are loaded by 3 worker processes"
    assert message.startswith(told)
    assert "(--dataloader_num_workers; this process may use 8 cores): take more of them, store" in message
    caplog.clear()
    watch([1.0] * 60, num_workers=0)
    watch([1.0] * 60, num_workers=8)
    assert "loaded by the main process (" in caplog.messages[0]
    assert "cores): give the run more cores and take more of them" in caplog.messages[1]
