"""Reads what `diffusers-mcm shapes build DIR` wrote into arrays, so that training need not decode a frame twice.

Writes videos.npy, uint8 (N, T, H, W, 3), images.npz with one such array (N, H, W, 3) a domain, and captions.json.
"""

import argparse
import csv
import json
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_mcm.shapes.build import IMAGE_DOMAINS, decode
from diffusers_mcm.shapes.captions import held_out


def rows(folder: Path) -> tuple[list[Path], list[str]]:
    """Files and captions of a folder, held-out captions refused."""
    with (folder / "metadata.csv").open(newline="") as table:
        records = list(csv.DictReader(table))
    captions = [record["caption"] for record in records]
    if read := sorted({caption for caption in captions if held_out(caption)}):
        raise ValueError(f"{folder} holds captions that no training may read, such as {read[0]!r}")
    return [folder / record["file_name"] for record in records], captions


def read_video(file: Path) -> np.ndarray:
    return decode(file.read_bytes())


def read_image(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--built", type=Path, required=True, help="folder written by `diffusers-mcm shapes build`")
    p.add_argument("--data", type=Path, required=True, help="where the arrays go")
    args = p.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    captions: dict[str, list[str]] = {}
    with Pool() as pool:
        files, captions["videos"] = rows(args.built / "videos")
        first = read_video(files[0])
        clips = np.lib.format.open_memmap(
            args.data / "videos.npy", mode="w+", dtype=np.uint8, shape=(len(files), *first.shape)
        )
        for number, clip in enumerate(pool.imap(read_video, files, chunksize=64)):
            clips[number] = clip
        clips.flush()
        images = {}
        for domain in IMAGE_DOMAINS:
            files, captions[domain] = rows(args.built / "images" / domain)
            images[domain] = np.stack(pool.map(read_image, files, chunksize=64))
        np.savez(args.data / "images.npz", **images)
    (args.data / "captions.json").write_text(json.dumps(captions))


if __name__ == "__main__":
    main()
