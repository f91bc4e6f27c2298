"""Tiny videos and images, written by the tests themselves. Frame k of clip c is one flat colour, so it can be told."""

import io
import json
import tarfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mcm.data.sources import VIDEOS, open_rows
from diffusers_mcm.data.video import read_clip


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """Keep what `datasets` prepares out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets_cache"))
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


def flat_frames(num_frames, width=32, height=24):
    """Frame k is gray of level 20 + 4k."""
    return [np.full((height, width, 3), 20 + 4 * k, dtype=np.uint8) for k in range(num_frames)]


def encode_mp4(frames, gop=8, b_frames=0, container="mp4", codec="libx264", rate=8):
    """Frames (H, W, 3) to the bytes of a file, H.264 in mp4 unless said otherwise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska" if container == "mkv" else container) as output:
        options = {"g": str(gop), "bf": str(b_frames), "keyint_min": str(gop)}
        options |= {"crf": "1", "sc_threshold": "0"} if codec == "libx264" else {"q": "2", "flags": "+qscale"}
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def frame_numbers(pixels):
    """Which frames of `flat_frames` a clip (3, T, H, W) in [-1, 1] shows."""
    levels = (pixels.mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round((float(level) - 20) / 4) for level in levels]


def read_numbers(data, num_frames, frame_interval, uniform):
    """Which frames of `flat_frames` a clip that is read from a file's bytes shows."""
    frames = read_clip({"path": None, "bytes": data}, num_frames, frame_interval, 24, 32, uniform)
    return frame_numbers(torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1)


def image_bytes(level, suffix="png", size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    return buffer.getvalue()


def write_tar(path, files):
    """`files` maps names to bytes, text or objects for json."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            if not isinstance(content, (bytes, str)):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture(scope="session")
def clip():
    """24 frames with keyframes at 0, 8 and 16."""
    return encode_mp4(flat_frames(24))


@pytest.fixture(scope="session")
def short_clip():
    return encode_mp4(flat_frames(3))


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory, clip):
    """Five clips of 24 frames with captions "clip 0" … "clip 4"; one is named as if it were a test split."""
    folder = tmp_path_factory.mktemp("videos")
    names = ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "test_e.mp4"]
    for name in names:
        (folder / name).write_bytes(clip)
    lines = [f"{name},clip {i}" for i, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    return folder


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory, clip, short_clip):
    """Two good clips, and one each that is short, broken, missing and without caption."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [("good1.mp4", "one"), ("good2.mp4", "two"), ("short.mp4", "s"), ("broken.mp4", "b")]
    rows += [("missing.mp4", "m"), ("silent.mp4", None)]
    files = {"good1.mp4": clip, "good2.mp4": clip, "short.mp4": short_clip, "broken.mp4": clip[:200]}
    for name, content in {**files, "silent.mp4": clip}.items():
        (folder / name).write_bytes(content)
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captions(rows):
    """The captions of the rows of a data set."""
    return [rows.caption(rows[i]) for i in range(len(rows))]


def open_tar(folder, files, kind=VIDEOS, **options):
    """`files` as of `write_tar`; nothing is decoded, so any bytes will do for a video."""
    write_tar(folder / "0.tar", files)
    return open_rows(folder, kind, **options)
