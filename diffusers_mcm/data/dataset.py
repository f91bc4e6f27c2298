"""Map-style data sets keyed by the global sample index, so that any split over processes reads the same items."""

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .faults import MachineError, UnusableItem, check_own_fault
from .images import read_image
from .rows import MediaRows, examples
from .sources import IMAGES, VIDEOS, open_rows
from .video import check_clip, read_clip

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


@lru_cache(maxsize=4)
def _epoch_places(num_rows: int, seed: int, purpose: str, epoch: int) -> torch.Tensor:
    """Where each row comes in an epoch."""
    return _epoch_order(num_rows, seed, purpose, epoch).argsort()


def _candidate_rows(num_rows: int, seed: int, purpose: str, index: int) -> Iterator[int]:
    """The row of a global index, then its replacements: every row once, in an order of the index's own."""
    epoch, position = divmod(index, num_rows)
    first = int(_epoch_order(num_rows, seed, purpose, epoch)[position])
    stride = 1 + _draw_bits(seed, f"{purpose} replacement", index) % max(num_rows - 1, 1)
    stride = next(number for number in itertools.count(stride) if math.gcd(number, num_rows) == 1)
    return ((first + attempt * stride) % num_rows for attempt in range(num_rows))


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], to the same bits on every device."""
    # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
    return pixels.to(torch.float32).div_(torch.full((), 127.5, device=pixels.device)).sub_(1)


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))


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

    def key(self, index: int) -> int:
        """The index whose draws an item has: its own, where items are not the same again in later epochs."""
        return index

    def read_pixels(self, media: dict, index: int) -> dict[str, torch.Tensor]:
        """Decode one item for one global index: uint8 "pixels", and what else there is of it."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[dict, dict[str, str]]:
        """The item of a global index, with uint8 pixels, and what was skipped on the way (name: reason).

        `ValueError` if nothing can be used; `MachineError` if the machine cannot read the item, which then stays.
        """
        if index < 0:
            raise IndexError(f"A global sample index is 0 or more, not {index}.")
        skipped: dict[str, str] = {}
        key = self.key(index)
        candidates = _candidate_rows(len(self.rows), self.seed, self.purpose, key)
        for row in itertools.islice(candidates, MAX_REPLACEMENTS):
            item = self.rows[row]
            name = self.rows.name(row, item)
            try:
                caption = self.rows.caption(item, keyed_fraction(self.seed, f"{self.purpose} caption", key))
                return {**self.read_pixels(self.rows.media(item), index), "caption": caption}, skipped
            except UnusableItem as reason:
                skipped[name] = str(reason)
            except (MachineError, MemoryError) as error:
                check_own_fault(error, name)
                raise
        raise ValueError(
            f"The {self.rows.kind.name} data {self.rows.source!r} yields nothing: none of the {len(skipped)} items "
            f"tried in a row can be used, for example{examples(skipped, 1)}"
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
        return {name: to_unit_range(value) if name != "caption" else value for name, value in item.items()}


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
        source: a folder with `metadata.csv` or `.jsonl` (or such a table), WebDataset tars (folder or glob), the
            address of one of these, or a Hub data set id.
        num_frames: frames per clip.
        frame_interval: every how many frames one is taken; shrinks to fit a short video. Default: 8, without `fps`.
        height, width: size of the clips: the shortest side is scaled, then the centre cropped.
        seed: keys the order and the starts.
        video_column: the column of the files, if it is not to be detected.
        fps: takes frames at this rate by the times at which they are shown, instead of every n-th one.
        decodes: says of a global index whether the pixels of its clip are looked at. Those of other clips are zeros
            (before `to_unit_range`): it is only seen to that there is a film, and one that is long enough.
        judged_frames: with l of them each item has "frames" (l, 3, H, W) too, one of each of l equal parts of the
            clip. Where the clip is not looked at, they alone are decoded.
        windows: of each video only so many clips are ever seen, those of the first epochs, so that they may be kept;
            by default each epoch has new ones.
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
        decodes: Callable[[int], bool] | None = None,
        judged_frames: int = 0,
        windows: int | None = None,
        **options: Any,
    ):
        if not 0 <= judged_frames <= num_frames:
            raise ValueError(f"judged_frames must be from 0 to the clip's {num_frames} frames, not {judged_frames}.")
        if frame_interval is not None and fps is not None:
            raise ValueError(f"Give frame_interval ({frame_interval}) or fps ({fps:g}), not both.")
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be greater than 0, not {fps}.")
        frame_interval = 8 if frame_interval is None else frame_interval
        sizes = dict(num_frames=num_frames, frame_interval=frame_interval, height=height, width=width)
        check_at_least_one(**sizes, windows=1 if windows is None else windows)
        super().__init__(open_rows(source, VIDEOS, media_column=video_column, **options), seed, "videos")
        self.num_frames, self.frame_interval, self.fps = num_frames, frame_interval, fps
        self.height, self.width = height, width
        self.decodes, self.judged_frames, self.windows = decodes, judged_frames, windows

    def key(self, index: int) -> int:
        """The sample of the first `windows` epochs that has the same video, clip and caption."""
        epoch, position = divmod(index, len(self))
        if self.windows is None or epoch < self.windows:
            return index
        row = int(_epoch_order(len(self), self.seed, self.purpose, epoch)[position])
        first = epoch % self.windows
        return first * len(self) + int(_epoch_places(len(self), self.seed, self.purpose, first)[row])

    def read_pixels(self, media: dict, index: int) -> dict[str, torch.Tensor]:
        judged = self._judged(self.key(index))
        if self.decodes is None or self.decodes(index):
            clip = _channels_first(self._read(media, index))
            return {"pixels": clip} | ({"frames": clip[:, list(judged)].movedim(1, 0).contiguous()} if judged else {})
        pixels = torch.zeros(3, self.num_frames, self.height, self.width, dtype=torch.uint8)
        if judged:
            frames = _channels_first(self._read(media, index, judged))
            return {"pixels": pixels, "frames": frames.movedim(1, 0).contiguous()}
        check_clip(media, self.num_frames)
        return {"pixels": pixels}

    def _read(self, media: dict, index: int, only: tuple[int, ...] | None = None) -> np.ndarray:
        size = (self.height, self.width)
        start = keyed_fraction(self.seed, "clip start", self.key(index))
        return read_clip(media, self.num_frames, self.frame_interval, *size, start, self.fps, only=only)

    def _judged(self, index: int) -> tuple[int, ...]:
        """The clip's frames that are judged, ascending."""
        parts = self.judged_frames
        edges = [part * self.num_frames // parts for part in range(parts + 1)] if parts else []
        draws = [keyed_fraction(self.seed, "frame", index * parts + part) for part in range(parts)]
        return tuple(first + int(draw * (end - first)) for first, end, draw in zip(edges, edges[1:], draws))


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

    def read_pixels(self, media: dict, index: int) -> dict[str, torch.Tensor]:
        return {"pixels": _channels_first(read_image(media, self.height, self.width))}
