"""Rows of `training.py` about data: opening it, and what the main process and a core have to do for a step."""

from __future__ import annotations

import csv
import importlib
import json
import os
import resource
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from training import Row

CAPTION = "a clip of number {}, in which a red circle moves left before a white wall and a dog looks on"


def _film(path: Path, height: int, width: int, seconds: float, seed: int = 0) -> bytes:
    """H.264 as it is found on the web: 30 frames a second, a keyframe each two seconds, moving texture."""
    import av

    generator = np.random.default_rng(seed)
    texture = generator.integers(0, 256, (height // 8, 2 * width // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"g": "60", "crf": "23", "preset": "fast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(round(30 * seconds)):
            picture = np.roll(texture, 3 * number, axis=1)[:height, :width]
            picture = picture // 2 + generator.integers(0, 16, picture.shape, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        output.mux(stream.encode())
    return path.read_bytes()


def _write_table(folder: Path, names: list[str]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = ((name, CAPTION.format(number)) for number, name in enumerate(names))
        csv.writer(file).writerows([("file_name", "caption"), *rows])


# --- opening a folder ------------------------------------------------------------------------------------------------
def _sizes(small: bool) -> tuple[int, int]:
    return (100, 1000) if small else (10_000, 100_000)


def _prepare_folders(folder: Path, small: bool) -> None:
    for size in _sizes(small):
        names = [f"{number % 100:02d}/{number:06d}.mp4" for number in range(size)]
        for below in {name.partition("/")[0] for name in names}:
            (folder / str(size) / below).mkdir(parents=True)
        for name in names:
            (folder / str(size) / name).touch()
        _write_table(folder / str(size), names)


def _open_folders(folder: Path, small: bool) -> dict[str, float]:
    from diffusers_mcm.data import VideoDataset

    few, many = _sizes(small)
    VideoDataset(folder / str(few))  # the libraries' imports
    seconds = {}
    for size in (few, many):
        before, begun = _peak(), time.process_time()
        dataset = VideoDataset(folder / str(size))
        seconds[size] = time.process_time() - begun
        if len(dataset) != size:
            raise RuntimeError(f"{len(dataset)} clips were opened, not {size}")
    return {
        f"{few:,} clips, s of the processor": seconds[few],
        f"{many:,} clips, s of the processor": seconds[many],
        "times for ten times the clips": seconds[many] / seconds[few],
        f"{many:,} clips, MiB at most": _peak() - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- tars ------------------------------------------------------------------------------------------------------------
def _prepare_tars(folder: Path, small: bool) -> None:
    tars, clips = (2, 3) if small else (40, 25)
    film = _film(folder / "film.mp4", 256, 256, 0.5 if small else 4)
    film += bytes(0 if small else (2 << 20) - len(film))  # to 2 MB, as a longer film has
    (folder / "film.mp4").unlink()
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for clip in range(clips):
                key = f"{number:05d}{clip:04d}"
                for name, content in (("mp4", film), ("json", json.dumps({"caption": CAPTION.format(key)}).encode())):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def _first_batch(folder: Path, small: bool) -> dict[str, float]:
    cache = folder / f"cache-{os.getpid()}"
    os.environ["DIFFUSERS_MCM_CACHE"] = os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = str(cache)
    from diffusers_mcm.data import StepLoader, StepSampler, VideoDataset, sources

    sources._import_datasets()
    figures = {}
    for which in ("first", "second"):
        begun = time.perf_counter()
        dataset = VideoDataset(str(folder / "*.tar"), num_frames=4, frame_interval=2, height=64, width=64)
        next(iter(StepLoader(dataset, StepSampler(1))))
        figures[f"{which} start, s to the first batch"] = time.perf_counter() - begun
    written = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return figures | {"bytes written for each clip": written / len(dataset)}


# --- a step of the main process --------------------------------------------------------------------------------------
def _prepare_step(folder: Path, small: bool) -> None:
    names = [f"{number}.mp4" for number in range(4)]
    for number, name in enumerate(names):
        _film(folder / name, *((64, 64, 2) if small else (720, 1280, 6)), seed=number)
    _write_table(folder, names)


def _step(folder: Path, small: bool) -> dict[str, float]:
    """All that the main process does beyond the networks: a batch, its draws, and both as the networks take them."""
    import torch
    from accelerate import Accelerator

    from diffusers_mcm.distillation.draws import Coins, draw_adversarial, draw_step
    from diffusers_mcm.training import batches as module
    from diffusers_mcm.training.config import TrainingConfig

    size, steps = (64, 3) if small else (256, 12)
    config = TrainingConfig(
        pretrained_teacher_model="mcm-shapes-teacher",
        video_data=str(folder),
        max_train_steps=steps + 1,
        lr_warmup_steps=0,
    )
    coins, accelerator, shape = Coins(config.lambda_real, 1, 1), Accelerator(cpu=True), (16, size, size)
    new = "coins" in module.open_data.__code__.co_varnames
    data = module.open_data(config, shape, coins) if new else module.open_data(config, shape)
    to_floats = importlib.import_module("diffusers_mcm.data").to_unit_range if new else lambda pixels: pixels
    latents, grid = (4, 16, size // 8, size // 8), torch.arange(19, 1000, 20)
    busy, waited = 0.0, 0.0
    batches = iter(module.build_batches(config, data, 0, accelerator))
    batch = next(batches)
    for _ in range(steps):
        begun = time.process_time()
        for pixels in (batch.pixels, batch.images):
            to_floats(pixels.to(accelerator.device))
        frames = config.num_adversarial_frames
        draw_step(config.seed, batch.indices, latents, grid, (5.0, 15.0), frames, coins).to(accelerator.device)
        draw_adversarial(config.seed, batch.indices, frames)
        busy += time.process_time() - begun
        time.sleep(0 if small else 1)  # while the networks compute, the workers are ahead
        begun, begun_waiting = time.process_time(), time.perf_counter()
        batch = next(batches)
        busy, waited = busy + time.process_time() - begun, waited + time.perf_counter() - begun_waiting
    return {
        "ms of the main process": 1000 * busy / steps,
        "ms of waiting, where the networks take 1 s": 1000 * waited / steps,
    }


# --- clips of a core -------------------------------------------------------------------------------------------------
def _prepare_clips(folder: Path, small: bool) -> None:
    for name, height, width in (("720p", 720, 1280), ("596x336", 336, 596)):
        _film(folder / f"{name}.mp4", *((64, 64) if small else (height, width)), 2 if small else 10)


def _clips(folder: Path, small: bool) -> dict[str, float]:
    """Clips by the least time that each of them took: what else the machine does only adds to it."""
    from diffusers_mcm.data.video import read_clip

    figures = {}
    for name in ("720p", "596x336"):
        media = {"path": str(folder / f"{name}.mp4"), "bytes": None}
        starts, least = (0.1, 0.5, 0.9), []
        for start in starts:
            seconds = []
            for _ in range(1 if small else 5):
                begun = time.process_time()
                read_clip(media, 16, 2 if small else 8, 256, 256, start)
                seconds.append(time.process_time() - begun)
            least.append(min(seconds))
        figures[f"{name}, clips each second"] = len(starts) / sum(least)
    return figures


ROWS = {
    "open a folder": Row(
        _open_folders,
        _prepare_folders,
        {"100,000 clips, s of the processor": "≤ 20", "times for ten times the clips": "≤ 12"},
    ),
    "tars, 2 GB in 40": Row(
        _first_batch,
        _prepare_tars,
        {"first start, s to the first batch": "≤ 3", "bytes written for each clip": "≤ 100"},
    ),
    "a step at 256², beyond the networks": Row(_step, _prepare_step, {"ms of the main process": "≤ 20"}),
    "a core": Row(
        _clips,
        _prepare_clips,
        {name: "not less" for name in ("720p, clips each second", "596x336, clips each second")},
    ),
}
