"""Writes the shapes world as data sets: poor H.264 videos with captions, and good images."""

import argparse
import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import atomic_folder
from ..video_io import encode_mp4
from .captions import Caption, held_out_captions, training_captions
from .render import DOMAINS, render_image, render_video

FPS = 8
CRF = 29  # of x264: visibly compressed
SHARD = 256  # samples per tar
IMAGE_DOMAINS = tuple(domain for domain in DOMAINS if domain != "video")
SPLITS: dict[str, Callable[[], list[Caption]]] = {"train": training_captions, "held_out": held_out_captions}


Sample = tuple[str, bytes]  # one item of a data set: its caption, and its file


def encode(frames: np.ndarray, crf: int = CRF) -> bytes:
    """An H.264 mp4 of uint8 frames (T, H, W, 3), H and W even; the same frames always give the same bytes."""
    if any(side % 2 for side in frames.shape[1:3]):
        raise ValueError(f"expected frames (T, H, W, 3) of even height and width, got {frames.shape}")
    return encode_mp4(frames, FPS, crf)


def decode(data: bytes) -> np.ndarray:
    """All frames of an mp4: uint8 (T, H, W, 3)."""
    import av

    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def compress(frames: np.ndarray, crf: int = CRF) -> np.ndarray:
    """What H.264 leaves of uint8 frames (T, H, W, 3): encoded and decoded in memory, the same shape."""
    return decode(encode(frames, crf))


def videos(count: int, split: str = "train", seed: int = 0, size: int = 64, num_frames: int = 16) -> Iterator[Sample]:
    """`count` poor videos as mp4; every caption of the split comes once before any comes again."""
    for caption, number in _schedule(count, split, seed, "video"):
        yield str(caption), encode(render_video(caption, number, "video", size, num_frames))


def images(count: int, domain: str, split: str = "train", seed: int = 0, size: int = 64) -> Iterator[Sample]:
    """`count` images of a domain as PNG; every caption of the split comes once before any comes again."""
    for caption, number in _schedule(count, split, seed, domain):
        buffer = io.BytesIO()
        Image.fromarray(render_image(caption, number, domain, size)).save(buffer, format="PNG")
        yield str(caption), buffer.getvalue()


def build(
    directory: str | os.PathLike,
    *,
    num_videos: int = 2064,
    num_images: int = 2064,
    image_domains: Sequence[str] = IMAGE_DOMAINS,
    split: str = "train",
    format: str = "folder",
    seed: int = 0,
    size: int = 64,
    num_frames: int = 16,
) -> Path:
    """Write `videos` and `images/<domain>` below a directory, completely or not at all; the directory.

    It must not exist, or be empty. `num_images` are of each domain, some of `clean`, `cartoon` and `pastel`; 0 is for
    none. Of the splits `train` uses the 516 captions that training may read and no other, `held_out` the other 60. As
    `folder` they are files and `metadata.csv`, as `datasets` reads them, as `tars` WebDataset. The same seed gives the
    same bytes; a larger number of videos begins with the same ones. `size`, even, is width and height in pixels.
    """
    record = {name: value for name, value in locals().items() if name != "directory"}
    directory = Path(directory)
    _check("split", split, SPLITS)
    _check("format", format, WRITERS)
    for domain in image_domains:
        _check("image domain", domain, IMAGE_DOMAINS)
    for name, value, least in (("videos", num_videos, 0), ("images", num_images, 0), ("frames", num_frames, 1)):
        if value < least:
            raise ValueError(f"the number of {name} must be at least {least}, got {value}")
    if size < 32 or size % 2:
        raise ValueError(f"size must be even and at least 32, got {size}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory: choose another, or remove it")
    with atomic_folder(directory) as temporary:
        if num_videos:
            WRITERS[format](temporary / "videos", videos(num_videos, split, seed, size, num_frames), "mp4")
        for domain in image_domains if num_images else ():
            WRITERS[format](temporary / "images" / domain, images(num_images, domain, split, seed, size), "png")
        (temporary / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return directory


def build_parser() -> argparse.ArgumentParser:
    """The flags of `diffusers-mcm shapes build`, under the names of `build`'s arguments."""
    parser = argparse.ArgumentParser(prog="diffusers-mcm shapes build", description=__doc__)
    add = parser.add_argument
    add("directory", metavar="DIR", help="where to write; must not exist, or be empty")
    add("--format", choices=tuple(WRITERS), default="folder", help="files and metadata.csv, or WebDataset tars")
    videos_help = "number of videos (default: %(default)s, 4 per caption)"
    add("--videos", dest="num_videos", type=int, default=2064, metavar="N", help=videos_help)
    images_help = "number of images per domain (default: %(default)s)"
    add("--images", dest="num_images", type=int, default=2064, metavar="N", help=images_help)
    add("--image_domains", nargs="*", choices=IMAGE_DOMAINS, default=IMAGE_DOMAINS, help="appearances of the images")
    add("--split", choices=tuple(SPLITS), default="train", help="captions to use; train never contains a held-out one")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--size", type=int, default=64, help="width and height in pixels (default: %(default)s)")
    add("--num_frames", type=int, default=16, help="frames per video (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`diffusers-mcm shapes build`: build what the flags say, and say what was built."""
    arguments = build_parser().parse_args(argv)
    directory = build(**vars(arguments))
    if arguments.num_videos:
        print(f"{directory / 'videos'}: {arguments.num_videos} videos")
    for domain in arguments.image_domains if arguments.num_images else ():
        print(f"{directory / 'images' / domain}: {arguments.num_images} images")


def _schedule(count: int, split: str, seed: int, domain: str) -> Iterator[tuple[Caption, int]]:
    """Captions in shuffled rounds, each with a render seed that no other domain or item has."""
    captions = SPLITS[split]()
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    order: list[int] = []
    for item in range(count):
        if not order:
            order = rng.permutation(len(captions)).tolist()
        yield captions[order.pop()], (seed * len(DOMAINS) + DOMAINS.index(domain)) * 10**7 + item


def _write_folder(directory: Path, samples: Iterator[Sample], extension: str) -> None:
    directory.mkdir(parents=True)
    with open(directory / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "caption"])
        for number, (caption, data) in enumerate(samples):
            name = f"{number:06d}.{extension}"
            (directory / name).write_bytes(data)
            rows.writerow([name, caption])


def _write_tars(directory: Path, samples: Iterator[Sample], extension: str) -> None:
    directory.mkdir(parents=True)
    numbered = enumerate(samples)
    for shard, first in enumerate(iter(lambda: next(numbered, None), None)):
        with tarfile.open(directory / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (caption, data) in chain([first], islice(numbered, SHARD - 1)):
                for suffix, content in ((extension, data), ("json", json.dumps({"caption": caption}).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path, Iterator[Sample], str], None]] = {"folder": _write_folder, "tars": _write_tars}


def _check(what: str, value: str, known: Sequence[str] | dict) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
