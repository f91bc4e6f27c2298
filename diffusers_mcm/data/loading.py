"""Which process reads which items, and the loader: resuming means starting at a later step."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .dataset import KeyedDataset, check_at_least_one, to_unit_range


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


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal or a scheduler sends its signals to all processes; a worker goes on until the main one ends it."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StepLoader:
    """Batches of a data set, in the order of a `StepSampler`; the same ones for any number of workers.

    Yields `{"pixels": float32 (B, …) in [-1, 1], "caption": list of B strings, "index": int64 (B,)}`. Items skipped
    in the workers are counted and warned of here, in `dataset.skipped`. Without `num_workers` this process decodes;
    `pin_memory` gives page-locked batches, for copies to a GPU.
    """

    def __init__(self, dataset: KeyedDataset, sampler: StepSampler, num_workers: int = 0, pin_memory: bool = False):
        self.dataset = dataset
        self._loader: DataLoader = DataLoader(
            _ReadWithReport(dataset),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, or starting an epoch would advance torch's global one
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __iter__(self) -> Iterator[dict]:
        for batch, skipped in self._loader:
            self.dataset.record_skipped(skipped)
            yield {**batch, "pixels": to_unit_range(batch["pixels"])}
