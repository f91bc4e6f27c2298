"""The samples of a run, by global sample index: clips with captions, and the real images for the discriminator."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..data import ImageDataset, KeyedDataset, StepLoader, StepSampler, VideoDataset, default_workers
from ..data.sources import MediaRows
from ..distillation.clips import EncodedClips
from ..distillation.draws import Coins
from ..distillation.image_text import ALIKE, ImageText, caption_overlap, pair_texts
from ..settings import LOW_NOISE
from ..wording import first_names
from .config import TrainingConfig

MAX_COMPARED = 1_000_000  # rows of a data set whose captions are compared, which takes seconds


class Batch(NamedTuple):
    """One micro-batch of one process."""

    indices: list[int]  # global sample indices
    # uint8 (B, 3, T, H, W), or what was encoded of it; zeros where the sample starts from the student's own video
    pixels: torch.Tensor | EncodedClips
    captions: list[str]
    images: torch.Tensor | None = None  # uint8 (B * l, 3, H, W), the l images of a sample side by side
    fake_texts: Sequence[str] = ()  # B * l, what the discriminator reads beside the sample's generated images
    real_texts: Sequence[str] = ()  # B * l, and beside `images`


class TrainingData(NamedTuple):
    """The data sets of a run, and the text of its real images.

    Without a discriminator there are no images, and without image data they are frames of the videos.
    """

    videos: VideoDataset
    images: ImageDataset | None
    image_text: ImageText


@dataclass(frozen=True)
class StartsFromData:
    """Whether the sample of a global index starts from the real video, so that its clip has to be decoded."""

    seed: int
    coins: Coins

    def __call__(self, index: int) -> bool:
        return bool(self.coins.draw(self.seed, [index]) < self.coins.lambda_real)


@dataclass(frozen=True)
class Batches:
    """Micro-batches from one optimiser step on to the end of the run."""

    videos: StepLoader
    images: StepLoader | None
    image_text: str  # a choice of `pair_texts`
    num_frames: int  # of a clip

    @property
    def loaders(self) -> dict[str, StepLoader]:
        """By what they load."""
        return {"videos": self.videos} | ({} if self.images is None else {"images": self.images})

    @property
    def sizes(self) -> dict[str, int | str | None]:
        """How many videos and images there are to take from, and what tells their order from others."""
        rows = {name: loader.dataset.rows for name, loader in self.loaders.items()}
        numbers = {f"number of {name}": len(each) for name, each in rows.items()}
        return numbers | {f"order of {name}": each.order() for name, each in rows.items()}

    @property
    def skipped(self) -> list[str]:
        """Names of the items that this process could not use so far."""
        return [name for loader in self.loaders.values() for name in loader.dataset.skipped]

    def __iter__(self) -> Iterator[Batch]:
        if self.images is None:
            for clips in self.videos:
                yield self._batch(clips, *self._own_frames(clips))
            return
        for clips, images in zip(self.videos, self.images, strict=True):
            yield self._batch(clips, images["pixels"], images["caption"])

    def _own_frames(self, clips: dict) -> tuple[torch.Tensor | None, list[str]]:
        """The judged frames of the clips, each with its clip's caption; None if nothing is judged."""
        if "frames" not in clips:
            return None, []
        frames = clips["frames"]  # (B, l, 3, H, W)
        return frames.flatten(0, 1), [caption for caption in clips["caption"] for _ in range(frames.shape[1])]

    def _batch(self, clips: dict, images: torch.Tensor | None, captions: list[str]) -> Batch:
        cached = "mean" in clips
        pixels = EncodedClips(clips["mean"], clips["deviation"], self.num_frames) if cached else clips["pixels"]
        samples = (clips["index"].tolist(), pixels, clips["caption"])
        if images is None:
            return Batch(*samples)
        frames = len(captions) // len(clips["caption"])
        prompts = [caption for caption in clips["caption"] for _ in range(frames)]
        return Batch(*samples, images, *pair_texts(self.image_text, prompts, captions))


def told_skipped(names: set[str]) -> str | None:
    """What to warn of at the end of a run: the items of the data that were of no use; None if all were."""
    return f"{len(names)} items of the data could not be used: {first_names(sorted(names), 5)}" if names else None


def open_data(config: TrainingConfig, clip_size: tuple[int, int, int], coins: Coins) -> TrainingData:
    """The data sets; `clip_size` is (T, H, W), and the coins of the run say which clips it looks at.

    Without a discriminator no image is ever opened.
    """
    num_frames, height, width = clip_size
    judged = config.adversarial and config.image_data is None
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
        decodes=None if takes_all_clips(config) else StartsFromData(config.seed, coins),
        judged_frames=config.num_adversarial_frames if judged else 0,
        windows=config.windows_per_clip,
    )
    images: ImageDataset | None = None
    if config.adversarial and config.image_data is not None:
        images = ImageDataset(
            config.image_data,
            size=(height, width),
            seed=config.seed,
            caption_column=config.image_caption_column,
            image_column=config.image_column,
        )
    compared = images if images is not None else videos if judged else None
    return TrainingData(videos, images, choose_image_text(config.image_text, compared, videos))


def check_usable(data: TrainingData, first: int) -> None:
    """Read an item of each data set, near the sample `first`: ValueError where none can be used as the flags say."""
    decodes = data.videos.decodes
    looked_at = (index for index in range(first, first + 1000) if decodes is None or decodes(index))
    data.videos.read(next(looked_at, first))
    if data.images is not None:
        data.images.read(first)


def takes_all_clips(config: TrainingConfig) -> bool:
    """Whether the clips are looked at of those samples too that start from the student's own video.

    The later of two experts makes its own from the real one with noise, and `--lambda_change` judges beside it how the
    real one changes.
    """
    return config.expert == LOW_NOISE or bool(config.lambda_change)


def choose_image_text(asked: str, images: KeyedDataset | None, videos: KeyedDataset) -> ImageText:
    """The text that `--image_text` asks for; "auto" takes "own" where the two caption sets are alike, else "none".

    It depends on the captions of the data sets alone, so all processes come to the same, and so does a resumed run.
    """
    if images is None:
        return ImageText(asked, "no images are looked at")
    overlap, finding = _compare(images.rows, videos.rows)
    if asked != "auto":
        return ImageText(asked, f"as --image_text says; {finding}", overlap)
    alike = overlap is not None and overlap >= ALIKE
    return ImageText("own" if alike else "none", finding, overlap)


def _compare(images: MediaRows, videos: MediaRows) -> tuple[float | None, str]:
    """The overlap of the captions, those of images without one left out, and what was found, in words."""
    if images is videos:
        return 1.0, "images are frames of the videos"
    if max(len(images), len(videos)) > MAX_COMPARED:
        return None, f"captions of more than {MAX_COMPARED:,} items are not compared"
    if images.far_captions or videos.far_captions:
        return None, "captions in remote tars are not compared"
    captions = [caption for caption in images.all_captions() if caption]
    if not captions:
        return None, "images have no captions"
    overlap = caption_overlap(captions, videos.all_captions())
    missing = len(images) - len(captions)
    without = f", {missing} of {len(images)} images have none" if missing else ""
    return overlap, f"captions of images and videos overlap by {overlap:.0%}{without}"


def build_batches(
    config: TrainingConfig,
    data: TrainingData,
    first_step: int,
    accelerator: Accelerator,
    encoded: KeyedDataset | None = None,
) -> Batches:
    """The micro-batches of this process, from step `first_step` on, of the `encoded` videos if there are such."""
    workers = num_workers(config, data.videos, accelerator)

    def load(dataset: KeyedDataset, workers: int, items_per_sample: int = 1) -> StepLoader:
        sampler = StepSampler(
            batch_size=config.train_batch_size,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            accumulation=config.accumulation,
            start_step=first_step,
            end_step=config.max_train_steps,
            items_per_sample=items_per_sample,
        )
        return StepLoader(dataset, sampler, workers, pin_memory=accelerator.device.type == "cuda")

    videos, images, image_text = data
    given = config.dataloader_num_workers
    image_workers = given if given is not None else math.ceil(workers / 4)  # a picture takes much less than a clip
    image_loader = None if images is None else load(images, image_workers, config.num_adversarial_frames)
    clips = videos if encoded is None else encoded
    return Batches(load(clips, workers), image_loader, image_text.choice, videos.num_frames)


def num_workers(config: TrainingConfig, videos: VideoDataset, accelerator: Accelerator) -> int:
    """The processes that load the videos of this one, by default as many as suit the machine."""
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    clip = 3 * (videos.num_frames + videos.judged_frames) * videos.height * videos.width  # bytes
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    return default_workers(config.train_batch_size * clip, here)
