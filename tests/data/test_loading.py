"""Who reads what: any split into processes and micro-batches gives the same samples, and resuming goes on exactly."""

import logging

import pytest
import torch

from diffusers_mcm.data import StepLoader, StepSampler, VideoDataset, to_unit_range


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
