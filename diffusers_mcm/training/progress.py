"""What a run shows while it goes: the losses of the step just made, how fast it is, and what it waits for."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")
_SHOWN = ("loss", "consistency", "adversarial", "discriminator")


def timed(items: Iterable[T], now: Callable[[], float]) -> Iterator[tuple[float, T]]:
    """The same items, each with the seconds that it took to come."""
    iterator = iter(items)
    while True:
        asked = now()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield now() - asked, item


class Lap(NamedTuple):
    """How long a step took."""

    seconds: float
    waited: float  # of them, for data

    @property
    def share(self) -> float:
        """The part of the time that was waited, from 0 to 1."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0


class Clock:
    """Seconds of the steps of this process, and how many of them went by until a batch was there."""

    def __init__(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that each takes to come is counted."""
        for waited, batch in timed(batches, time.perf_counter):
            self.waited += waited
            yield batch

    def lap(self) -> Lap:
        """The time since the last lap; the counts start anew."""
        now = time.perf_counter()
        lap = Lap(now - self.started, self.waited)
        self.started, self.waited = now, 0.0
        return lap


def peak_memory(device: torch.device) -> int:
    """The most bytes that were taken so far: on a GPU by tensors, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProgressBar:
    """A bar for the steps of a run. A terminal that is gone, or a pipe without a reader, ends the bar, not the run."""

    def __init__(self, first_step: int, num_steps: int, total_batch: int, device: torch.device, shown: bool):
        self.total_batch, self.device = total_batch, device
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", desc="distilling", disable=not shown)

    def show(self, losses: dict[str, float], lap: Lap) -> None:
        """A step was made, with these losses."""
        told = {name: f"{losses[name]:.4g}" for name in _SHOWN if name in losses}
        if lap.seconds > 0:
            told |= {"clips/s": f"{self.total_batch / lap.seconds:.3g}", "waiting": f"{lap.share:.0%}"}
        told["peak"] = f"{peak_memory(self.device) / 2**30:.1f} GiB"
        try:
            self.bar.set_postfix(told, refresh=False)  # before the bar moves, which may draw it
            self.bar.update()
        except OSError:
            self.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()
        self.bar.disable = True
