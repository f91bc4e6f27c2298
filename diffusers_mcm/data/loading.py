"""Which process reads which items, and the loader: resuming means starting at a later step."""

import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .dataset import KeyedDataset, check_at_least_one
from .faults import MachineError

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
_AHEAD = 2  # batches that each worker has ready
_GRACE = 20.0  # seconds for which a worker goes on after SIGTERM; launchers kill after 30
_SHARED_MEMORY = "/dev/shm"
_DEAD = r"DataLoader worker .*(exited unexpectedly|killed by signal)"


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """Global sample indices of one process's micro-batches, step by step.

    With R processes, micro-batch B and accumulation A, step s uses the samples from s·RBA to (s + 1)·RBA whatever
    R, B and A are. Micro-batch a of process r takes the B samples from s·RBA + (a·R + r)·B on. Each is yielded as a
    list, so A lists make a step.

    """

    batch_size: int  # B
    rank: int = 0  # r
    num_processes: int = 1  # R
    accumulation: int = 1  # A
    start_step: int = 0  # the step to begin with; a resumed run gives the one it stopped before
    end_step: int | None = None  # the step to stop before; None goes on for ever
    items_per_sample: int = 1  # l, of data read l times per sample: sample g has items g·l … g·l + l − 1

    def __post_init__(self):
        counts = ("batch_size", "num_processes", "accumulation", "items_per_sample")
        check_at_least_one(**{name: getattr(self, name) for name in counts})
        if not 0 <= self.rank < self.num_processes:
            raise ValueError(f"rank must be from 0 to {self.num_processes - 1}, not {self.rank}.")
        if self.start_step < 0:
            raise ValueError(f"start_step must be 0 or more, not {self.start_step}.")

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.items_per_sample
        end = sys.maxsize if self.end_step is None else self.end_step * self.accumulation
        for number in range(self.start_step * self.accumulation, end):  # of micro-batches, s·A + a
            first = (number * self.num_processes + self.rank) * size
            yield list(range(first, first + size))


class _ReadWithReport(Dataset):
    """A worker's view of a data set: what it skipped travels with the item, to be counted in the main process."""

    def __init__(self, dataset: KeyedDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[dict, dict[str, str]]:
        item, skipped = self.dataset.read(index)
        return {**item, "index": index}, skipped


def _collate(reads: list[tuple[dict, dict[str, str]]]) -> tuple[dict, dict[str, str]]:
    items, reports = zip(*reads, strict=True)
    return default_collate(list(items)), {name: reason for report in reports for name, reason in report.items()}


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(batch_bytes: int, processes_here: int = 1) -> int:
    """How many worker processes suit each of the training processes on this machine: a core each, one left over, and
    no more than 8. There is at least one, unless the shared memory has no room for its batches of so many bytes.
    """
    wanted = min(max(usable_cores() // processes_here - 1, 1), _MOST_WORKERS)
    try:
        room = shutil.disk_usage(_SHARED_MEMORY).free // processes_here
    except OSError:
        return wanted
    fitting = int(room / 2 // max(_AHEAD * batch_bytes, 1))
    if fitting < wanted:
        logger.warning(
            "Data are loaded by %s, where %d worker processes would suit this machine: its shared memory (%s) has "
            "room for no more, %.0f MB. Give it more (docker run --shm-size=8g).",
            f"{fitting} worker processes" if fitting else "the main process", wanted, _SHARED_MEMORY, room / 1e6,
        )  # fmt: skip
    return min(wanted, fitting)


def _outlive_a_stop(worker: int) -> None:
    """A terminal or a scheduler sends its signals to all processes; a worker goes on, so that a step may be finished.

    SIGTERM ends it `_GRACE` seconds later: Python ends by it at exit what is left of its workers, and waits for that.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(*_: object) -> None:
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, _GRACE)  # SIGALRM, for which there is no handler


class StepLoader:
    """Batches of a data set, in the order of a `StepSampler` or other lists of indices; the same for any number of
    workers.

    Yields `{"pixels": uint8 (B, …), "caption": list of B strings, "index": int64 (B,)}`, and what else the items have;
    `to_unit_range` makes floats of the pixels, on the device that they are for. Items skipped in the workers are
    counted and warned of here, in `dataset.skipped`. Without `num_workers` this process decodes; `pin_memory` gives
    page-locked batches, for copies to a GPU. A worker that dies is a `WorkerDied`, and what the machine cannot read a
    `MachineError`, in a worker as here.
    """

    def __init__(
        self, dataset: KeyedDataset, sampler: Iterable[list[int]], num_workers: int = 0, pin_memory: bool = False
    ):
        self.dataset, self.num_workers = dataset, num_workers
        self._loader: DataLoader = DataLoader(
            _ReadWithReport(dataset),
            batch_sampler=sampler,
            num_workers=num_workers,
            prefetch_factor=_AHEAD if num_workers else None,
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, or starting an epoch would advance torch's global one
            worker_init_fn=_outlive_a_stop,
        )

    def __iter__(self) -> Iterator[dict]:
        batches = iter(self._loader)
        while True:
            try:
                with worker_deaths_told():
                    batch, skipped = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:  # a batch of which the worker died before it was taken over
                raise _death(error) from error
            except MachineError as error:  # of a worker, whose traceback torch puts into the message
                told = str(error).rpartition(f"{MachineError.__name__}: ")[2].strip()
                raise MachineError(told, error.errno) from error
            self.dataset.record_skipped(skipped)
            yield batch


class WorkerDied(RuntimeError):
    """A process that loads data has died; the message says what may help."""


@contextmanager
def worker_deaths_told() -> Iterator[None]:
    """Raises `WorkerDied` where torch says that a worker of a loader is dead, as it does wherever that is noticed."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WorkerDied) or re.search(_DEAD, str(error)) is None:
            raise
        raise _death(error) from error


def _death(error: Exception) -> WorkerDied:
    return WorkerDied(
        f"A process that loads data has died ({type(error).__name__}: {str(error).strip()}). Mostly the machine was "
        f"short of memory (its log says so: dmesg) or of shared memory ({_SHARED_MEMORY}; docker run --shm-size=8g): "
        "take fewer --dataloader_num_workers. If it happens again at the same step, a file makes the decoder crash, "
        "and --dataloader_num_workers 0 shows at which. Go on with --resume_from_checkpoint latest."
    )
