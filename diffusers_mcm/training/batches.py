"""The samples of a run, by global sample index: clips with captions, and the real images for the discriminator."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..data import FrameDataset, ImageDataset, StepLoader, VideoDataset, build_loader
from .config import TrainingConfig


class Batch(NamedTuple):
    """One micro-batch of one process."""

    indices: list[int]  # global sample indices
    pixels: torch.Tensor  # (B, 3, T, H, W) in [-1, 1]
    captions: list[str]
    images: torch.Tensor | None = None  # (B * l, 3, H, W) in [-1, 1], the l images of a sample side by side
    image_captions: list[str] | None = None


class Batches:
    """Micro-batches from one optimiser step on to the end of the run."""

    def __init__(self, videos: StepLoader, images: StepLoader | None):
        self.videos, self.images = videos, images

    @property
    def sizes(self) -> dict[str, int]:
        """How many videos and images there are to take from."""
        loaders = {"number of videos": self.videos, "number of images": self.images}
        return {name: len(loader.dataset) for name, loader in loaders.items() if loader is not None}

    @property
    def skipped(self) -> list[str]:
        """Names of the items that this process could not use so far."""
        loaders = [loader for loader in (self.videos, self.images) if loader is not None]
        return [name for loader in loaders for name in loader.dataset.skipped]

    def __iter__(self) -> Iterator[Batch]:
        if self.images is None:
            for clips in self.videos:
                yield Batch(clips["index"].tolist(), clips["pixels"], clips["caption"])
            return
        for clips, images in zip(self.videos, self.images, strict=True):
            yield Batch(
                clips["index"].tolist(), clips["pixels"], clips["caption"], images["pixels"], images["caption"]
            )


def build_batches(
    config: TrainingConfig,
    clip_size: tuple[int, int, int],
    first_step: int,
    process: int,
    num_processes: int,
    pin_memory: bool,
) -> Batches:
    """Loaders of this process; `clip_size` is (T, H, W). Without a discriminator no image is ever opened."""
    num_frames, height, width = clip_size
    videos = VideoDataset(
        config.video_data,
        num_frames=num_frames,
        frame_interval=config.frame_interval,
        fps=config.data_fps,
        height=height,
        width=width,
        seed=config.seed,
        caption_column=config.caption_column,
        video_column=config.video_column,
    )
    options = dict(
        batch_size=config.train_batch_size,
        rank=process,
        num_processes=num_processes,
        accumulation=config.gradient_accumulation_steps,
        start_step=first_step,
        end_step=config.max_train_steps,
        num_workers=config.dataloader_num_workers,
        pin_memory=pin_memory,
    )
    images = None
    if config.adversarial and config.image_data is None:
        images = FrameDataset(videos)
    elif config.adversarial:
        images = ImageDataset(
            config.image_data,
            size=(height, width),
            seed=config.seed,
            caption_column=config.image_caption_column,
            image_column=config.image_column,
        )
    image_loader = images and build_loader(images, items_per_sample=config.num_adversarial_frames, **options)
    return Batches(build_loader(videos, **options), image_loader)
