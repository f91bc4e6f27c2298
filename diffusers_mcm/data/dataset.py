"""Map-style data sets keyed by the global sample index, so that any split over processes reads the same items."""

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .faults import MachineError, UnusableItem, check_own_fault
from .images import read_image
from .rows import MediaRows, examples
from .sources import IMAGES, VIDEOS, open_rows
from .video import read_clip

logger = logging.getLogger(__name__)

#: After so many different items in a row that cannot be used, the data set gives up.
MAX_REPLACEMENTS = 1000


def _draw_bits(seed: int, purpose: str, index: int) -> int:
    """53 random bits that depend on nothing but the arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:8], "big") >> 11


def keyed_fraction(seed: int, purpose: str, index: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    return _draw_bits(seed, purpose, index) / 2**53


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, purpose: str, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_draw_bits(seed, f"{purpose} order", epoch))
    return torch.randperm(num_rows, generator=generator)


def _candidate_rows(num_rows: int, seed: int, purpose: str, index: int) -> Iterator[int]:
    """The row of a global index, then its replacements: every row once, in an order of the index's own."""
    epoch, position = divmod(index, num_rows)
    first = int(_epoch_order(num_rows, seed, purpose, epoch)[position])
    stride = 1 + _draw_bits(seed, f"{purpose} replacement", index) % max(num_rows - 1, 1)
    stride = next(number for number in itertools.count(stride) if math.gcd(number, num_rows) == 1)
    return ((first + attempt * stride) % num_rows for attempt in range(num_rows))


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


class KeyedDataset(Dataset):
    """Items of `rows`, in a new order each epoch, keyed by the global sample index.

    Index `i` may be any number from 0 on: epoch `i // len(self)`. An item that cannot be used is replaced by another
    one; which one depends on the seed and the index only. `skipped` maps the name of each such item to the reason,
    those that were left out on opening first.
    """

    def __init__(self, rows: MediaRows, seed: int, purpose: str):
        self.rows, self.seed, self.purpose = rows, seed, purpose
        self.skipped: dict[str, str] = dict(rows.skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def read_pixels(self, media: dict, index: int) -> np.ndarray:
        """Decode one item for one global index: uint8, channels last."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[dict, dict[str, str]]:
        """The item of a global index, with uint8 pixels, and what was skipped on the way (name: reason).

        `ValueError` if nothing can be used; `MachineError` if the machine cannot read the item, which then stays.
        """
        if index < 0:
            raise IndexError(f"A global sample index is 0 or more, not {index}.")
        skipped: dict[str, str] = {}
        candidates = _candidate_rows(len(self.rows), self.seed, self.purpose, index)
        for row in itertools.islice(candidates, MAX_REPLACEMENTS):
            item = self.rows[row]
            name = self.rows.name(row, item)
            try:
                caption = self.rows.caption(item, keyed_fraction(self.seed, f"{self.purpose} caption", index))
                pixels = self.read_pixels(self.rows.media(item), index)
                return {"pixels": torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()), "caption": caption}, skipped
            except UnusableItem as reason:
                skipped[name] = str(reason)
            except (MachineError, MemoryError) as error:
                check_own_fault(error, name)
                raise
        raise ValueError(
            f"The {self.rows.kind.name} data {self.rows.source!r} yields nothing: none of the {len(skipped)} items "
            f"tried in a row can be used, for example{examples(skipped)}"
        )

    def record_skipped(self, skipped: dict[str, str]) -> None:
        """Count what was skipped, and warn of each item once, by its name."""
        for name, reason in skipped.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                logger.warning("Skipped %s: %s (%d skipped so far).", name, reason, len(self.skipped))

    def __getitem__(self, index: int) -> dict:
        item, skipped = self.read(index)
        self.record_skipped(skipped)
        return {**item, "pixels": to_unit_range(item["pixels"])}


def check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}.")


class VideoDataset(KeyedDataset):
    """Clips with captions.

    `dataset[i]` is `{"pixels": float32 (3, T, H, W) in [-1, 1], "caption": str}`. The clip starts where the seed and
    `i` say. Clips that are broken, have no caption or fewer than `num_frames` frames are replaced. Of several captions
    in a list each is drawn equally often.

    Args:
        source: a folder with `metadata.csv` or `.jsonl` (or such a table), WebDataset tars (folder or glob), or a Hub
            data set id.
        num_frames: frames per clip.
        frame_interval: every how many frames one is taken; shrinks to fit a short video. Default: 8, without `fps`.
        height, width: size of the clips: the shortest side is scaled, then the centre cropped.
        seed: keys the order and the starts.
        video_column: the column of the files, if it is not to be detected.
        fps: takes frames at this rate by the times at which they are shown, instead of every n-th one.
        options: `split`, `caption_column`, `config_name` and `revision`, as in `DataRequest`.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        num_frames: int = 16,
        frame_interval: int | None = None,
        height: int = 256,
        width: int = 256,
        seed: int = 0,
        video_column: str | None = None,
        fps: float | None = None,
        **options: Any,
    ):
        if frame_interval is not None and fps is not None:
            raise ValueError(f"Give frame_interval ({frame_interval}) or fps ({fps:g}), not both.")
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be greater than 0, not {fps}.")
        frame_interval = 8 if frame_interval is None else frame_interval
        check_at_least_one(num_frames=num_frames, frame_interval=frame_interval, height=height, width=width)
        super().__init__(open_rows(source, VIDEOS, media_column=video_column, **options), seed, "videos")
        self.num_frames, self.frame_interval, self.fps = num_frames, frame_interval, fps
        self.height, self.width = height, width

    def read_pixels(self, media: dict, index: int) -> np.ndarray:
        start = keyed_fraction(self.seed, "clip start", index)
        return read_clip(media, self.num_frames, self.frame_interval, self.height, self.width, start, self.fps)


class ImageDataset(KeyedDataset):
    """Images, with captions if there are any.

    `dataset[i]` is `{"pixels": float32 (3, H, W) in [-1, 1], "caption": str}`, the caption "" where there is none.

    Args:
        source: a folder of images (with or without metadata), WebDataset tars, or a Hub data set id.
        size: side of the square images, or `(height, width)`.
        seed, image_column, options: as in `VideoDataset`.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        size: int | tuple[int, int] = 256,
        seed: int = 0,
        image_column: str | None = None,
        **options: Any,
    ):
        self.height, self.width = (size, size) if isinstance(size, int) else size
        check_at_least_one(height=self.height, width=self.width)
        super().__init__(open_rows(source, IMAGES, media_column=image_column, **options), seed, "images")

    def read_pixels(self, media: dict, index: int) -> np.ndarray:
        return read_image(media, self.height, self.width)


class FrameDataset(KeyedDataset):
    """Frames of a video data set as images, each with its clip's caption, in an order of their own.

    `dataset[i]` is `{"pixels": float32 (3, H, W) in [-1, 1], "caption": str}`; only that frame is decoded for use.
    Frames of videos that are too short for a clip are left out: their captions are never those of a clip.
    """

    def __init__(self, videos: VideoDataset):
        super().__init__(videos.rows, videos.seed, "frames")
        self.height, self.width = videos.height, videos.width
        self.fps, self.min_frames = videos.fps, videos.num_frames

    def read_pixels(self, media: dict, index: int) -> np.ndarray:
        start = keyed_fraction(self.seed, "frame", index)
        return read_clip(media, 1, 1, self.height, self.width, start, self.fps, self.min_frames)[0]
