"""How much of a run's time goes by while it waits for its data."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..data.loading import usable_cores
from .progress import timed

logger = logging.getLogger(__name__)

MUCH = 0.2  # share of the time from which on it is warned of
_BATCHES = 50  # micro-batches over which the share is taken
T = TypeVar("T")


class Waiting:
    """The share of the time for which micro-batches are waited for, warned of once where it is much.

    `for batch in waiting.watch(batches)` goes over the batches as `for batch in batches` does.
    """

    def __init__(self, num_workers: int, tells: bool = True, now: Callable[[], float] = time.perf_counter):
        self.num_workers, self.now = num_workers, now
        self._spent: deque[tuple[float, float]] = deque(maxlen=_BATCHES)  # seconds waiting for a batch, and in all
        self._warned = not tells  # of the processes on a machine, whose data come alike, one tells

    @property
    def share(self) -> float:
        """Of the time of the last 50 micro-batches; 0 as long as there are none."""
        waited, whole = map(sum, zip(*self._spent)) if self._spent else (0.0, 0.0)
        return waited / whole if whole else 0.0

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, timed but for the first, for which the workers have to start."""
        first = True
        for waited, batch in timed(batches, self.now):
            there = self.now()
            yield batch
            if not first:
                self._spent.append((waited, waited + self.now() - there))
                self._warn()
            first = False

    def _warn(self) -> None:
        if self._warned or len(self._spent) < _BATCHES or self.share < MUCH:
            return
        self._warned = True
        cores = usable_cores()
        more = "take more of them" if self.num_workers < cores else "give the run more cores and take more of them"
        logger.warning(
            "%.0f %% of the time the training waits for its data, which are loaded by %s (--dataloader_num_workers; "
            "this process may use %d cores): %s, store the videos smaller or with more keyframes, or bring the data "
            "nearer.",
            100 * self.share, f"{self.num_workers} worker processes" if self.num_workers else "the main process",
            cores, more,
        )  # fmt: skip
