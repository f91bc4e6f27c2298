"""Who reads what: any split into processes and micro-batches gives the same samples, and resuming goes on exactly."""

import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_mcm.data import StepLoader, StepSampler, VideoDataset, to_unit_range
from diffusers_mcm.data import loading as module
from diffusers_mcm.data.faults import MachineError

ROOT = Path(__file__).parents[2]


def open_videos(source):
    return VideoDataset(source, num_frames=2, frame_interval=2, height=8, width=8)


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "accumulation"), [(12, 1, 1), (4, 3, 1), (3, 1, 4), (2, 3, 2), (1, 2, 6)]
)
@pytest.mark.parametrize("items_per_sample", [1, 2])
def test_a_step_reads_the_same_samples_however_split(batch_size, num_processes, accumulation, items_per_sample):
    read = [[], [], []]
    for rank in range(num_processes):
        sampler = StepSampler(batch_size, rank, num_processes, accumulation, 0, 3, items_per_sample)
        batches = list(sampler)
        assert len(batches) == 3 * accumulation
        for step in range(3):
            for indices in batches[step * accumulation : (step + 1) * accumulation]:
                read[step] += indices
    size = 12 * items_per_sample
    assert [sorted(step) for step in read] == [list(range(s * size, (s + 1) * size)) for s in range(3)]


def test_images_belong_to_the_samples_of_the_video_batch():
    videos = StepSampler(2, 1, 2, 2, 5, 6)
    images = StepSampler(2, 1, 2, 2, 5, 6, items_per_sample=3)
    for samples, items in zip(videos, images, strict=True):
        assert items == [3 * g + j for g in samples for j in range(3)]


def test_resuming_is_starting_later():
    arguments = {"batch_size": 2, "rank": 1, "num_processes": 2, "accumulation": 3}
    whole = list(StepSampler(**arguments, end_step=7))
    assert list(StepSampler(**arguments, start_step=4, end_step=7)) == whole[4 * 3 :]


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, not 0"):
        StepSampler(0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, not 2"):
        StepSampler(1, rank=2, num_processes=2)
    with pytest.raises(ValueError, match="start_step must be 0 or more, not -1"):
        StepSampler(1, start_step=-1)


def test_batches_are_the_items(video_folder):
    dataset = open_videos(video_folder)
    batch = next(iter(StepLoader(dataset, StepSampler(3, start_step=2))))
    assert batch["index"].tolist() == [6, 7, 8]
    assert batch["pixels"].shape == (3, 3, 2, 8, 8) and batch["pixels"].dtype == torch.uint8
    for k in range(3):
        assert torch.equal(to_unit_range(batch["pixels"][k]), dataset[6 + k]["pixels"])
        assert batch["caption"][k] == dataset[6 + k]["caption"]


def test_workers_give_the_same_batches_and_report_what_they_skip(mixed_folder, caplog):
    alone, helped = open_videos(mixed_folder), open_videos(mixed_folder)
    expected = list(StepLoader(alone, StepSampler(2, end_step=6)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        batches = list(StepLoader(helped, StepSampler(2, end_step=6), num_workers=2))
    for batch, reference in zip(batches, expected, strict=True):
        assert torch.equal(batch["pixels"], reference["pixels"])
        assert batch["caption"] == reference["caption"]
    assert helped.skipped == alone.skipped
    assert len(helped.skipped) == 3  # two frames are enough for the clip of three
    assert len(caplog.messages) == 1  # the other two were warned of on opening
    assert "broken.mp4" in caplog.text


def test_reading_leaves_the_global_generator_alone(video_folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(StepLoader(open_videos(video_folder), StepSampler(1))))
    assert torch.equal(torch.get_rng_state(), before)


def test_error_in_a_worker_arrives(video_folder):
    dataset = VideoDataset(video_folder, num_frames=30, height=8, width=8)
    with pytest.raises(ValueError, match="yields nothing"):
        next(iter(StepLoader(dataset, StepSampler(1), num_workers=1)))


DYING = """
import os, sys
from diffusers_mcm.data import StepLoader, StepSampler, VideoDataset

def decodes(index):  # a clip at which the decoder crashes
    if index == 2:
        os.kill(os.getpid(), int(sys.argv[2]))
    return True

dataset = VideoDataset(sys.argv[1], num_frames=2, height=8, width=8, decodes=decodes)
for batch in StepLoader(dataset, StepSampler(1, end_step=4), num_workers=1):
    print(batch["index"].item(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_told_with_what_to_do(video_folder, number):
    """In a process of its own: torch raises the error wherever the main process happens to be."""
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(video_folder), str(int(number))], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0 and done.stdout.split()[:1] in (["0"], [])  # what it had ready may be lost with it
    told = r"A process that loads data has died \(.*take fewer --dataloader_num_workers.*latest"
    assert re.search(told, done.stderr, re.DOTALL), done.stderr


LEFT = """
import multiprocessing, os, signal, sys
from diffusers_mcm.data import StepLoader, StepSampler, loading
from tests.data.test_loading import open_videos

loading._GRACE = 1.0
loader = StepLoader(open_videos(sys.argv[1]), StepSampler(1, 0, 1, 1, 0, 50), num_workers=1)
batches = iter(loader)
print(next(batches)["index"].item())
(worker,) = multiprocessing.active_children()
if sys.argv[2] == "signal":
    os.kill(worker.pid, signal.SIGTERM)
    print(*(next(batches)["index"].item() for _ in range(4)))  # more than were ready
kept_to_the_end = [batches]
"""


@pytest.mark.parametrize("way", ["signal", "exit"])
def test_a_worker_outlives_a_signal_to_all_but_not_the_process(video_folder, way):
    """What is read half and kept by a global is ended by Python at its exit, with SIGTERM, for which it waits."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT, str(video_folder), way], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    expected = ["0", "1 2 3 4"] if way == "signal" else ["0"]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_what_the_machine_cannot_read_is_told_without_a_workers_traceback(video_folder, monkeypatch):
    def fail(*_):
        raise MachineError("a.mp4: its server gives whole files only.")

    dataset = open_videos(video_folder)
    monkeypatch.setattr(type(dataset), "read", fail)
    with pytest.raises(MachineError) as error:
        next(iter(StepLoader(dataset, StepSampler(1), num_workers=1)))
    assert str(error.value) == "a.mp4: its server gives whole files only."


def test_other_errors_are_not_taken_for_a_workers_death():
    with pytest.raises(RuntimeError, match="^out of memory$") as error, module.worker_deaths_told():
        raise RuntimeError("out of memory")
    assert not isinstance(error.value, module.WorkerDied)


class Disk:
    def __init__(self, free):
        self.free = free


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (4, 1, 3), (64, 1, 8), (64, 8, 7), (8, 8, 1), (4, 8, 1)]
)
def test_as_many_workers_as_there_are_cores_for(monkeypatch, caplog, cores, processes, workers):
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(1 << 40))
    assert module.default_workers(3 << 20, processes) == workers and not caplog.messages


def test_shared_memory_that_is_too_small_is_told(monkeypatch, caplog):
    """Docker gives 64 MB, unless it is told otherwise."""
    monkeypatch.setattr(module, "usable_cores", lambda: 16)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(64 << 20))
    assert module.default_workers(3 << 20) == 5
    assert "loaded by 5 worker processes, where 8" in caplog.text and "docker run --shm-size=8g" in caplog.text
    assert module.default_workers(100 << 20) == 0
    assert "Data are loaded by the main process, where 8 worker processes would suit this machine" in caplog.text

    def none(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("shutil.disk_usage", none)
    assert module.default_workers(100 << 20) == 8
