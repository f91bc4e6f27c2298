"""Videos as H.264, GIF, WebP, frames or pictures, whole or not at all; how they were made is read back from them.

The name is public: the README and people's scripts import `write_video` from here. Films are read in `data/`. What is
known of a video is written as JSON in plain ASCII, which every one of the formats can hold.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .files import atomic_file, atomic_folder

_HALF_A_LEVEL = 0.5 / 255
_MARGIN = 4
_LABEL_WIDTH = 190
_EXIF_DESCRIPTION = 0x010E
_METADATA_FILE = "metadata.json"
_SLOWEST, _FASTEST = 0.01, 1000  # frames per second that every one of the formats can hold
_TELEVISION = (12, 15, 24, 30, 48, 60, 120, 240)  # times 1000/1001, which is written 23.976, 29.97, 59.94 …
# In seconds: what a format counts delays in, and the shortest that browsers play as it is written. They play a GIF's
# delay of one hundredth five to ten times slower, and take ten milliseconds in a WebP for a hundred.
_GIF_DELAYS = (Fraction(1, 100), 2)
_WEBP_DELAYS = (Fraction(1, 1000), 11)


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3), float in [0, 1] or uint8 -> uint8 in [0, 255].

    Float values may leave [0, 1] by half a level, which rounding takes away; `ValueError` for others, and for NaN.
    """
    try:
        video = np.asarray(video)
    except (TypeError, RuntimeError) as error:  # a tensor of a type that NumPy lacks, on a GPU, or with gradients
        raise ValueError(f"expected frames as a NumPy array, got {type(video).__name__} ({error})") from error
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"expected frames of shape (T, H, W, 3), none of them 0, got {video.shape}")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"expected frames of type uint8, or float in [0, 1], got {video.dtype}")
    if not_finite := video.size - np.count_nonzero(np.isfinite(video)):
        raise ValueError(f"expected finite frames, got {not_finite} values of {video.size} that are NaN or infinite")
    low, high = float(video.min()), float(video.max())
    if low < -_HALF_A_LEVEL or high > 1 + _HALF_A_LEVEL:
        raise ValueError(
            f"expected float frames in [0, 1], got values from {low:g} to {high:g}; of [-1, 1] take video / 2 + 0.5,"
            " of [0, 255] video.astype(np.uint8)"
        )
    return (video.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def check_fps(fps: float, name: str = "fps") -> float:
    """Frames per second as they came; `ValueError` that names the argument unless they are from 0.01 to 1000."""
    is_number = isinstance(fps, Real) and not isinstance(fps, bool)
    if not is_number or not 0 < fps < float("inf"):  # nan is on neither side
        raise ValueError(f"expected {name} above 0, got {f'{fps:g}' if is_number else repr(fps)}")
    if not _SLOWEST <= fps <= _FASTEST:
        raise ValueError(f"expected {name} from {_SLOWEST} to {_FASTEST}, got {fps:g}")
    return fps


def exact_rate(fps: float) -> Fraction:
    """Frames per second as a ratio; what is written 23.976 or 29.97 is television's 24000/1001 or 30000/1001."""
    check_fps(fps)
    ratios = [Fraction(1000 * rate, 1001) for rate in _TELEVISION]
    near = [ratio for ratio in ratios if abs(fps - ratio) < 0.005]  # two digits are enough
    return near[0] if near else Fraction(float(fps)).limit_denominator(100_000)


def encode_mp4(video: np.ndarray, fps: float = 8, crf: int = 16, metadata: Mapping | None = None) -> bytes:
    """Frames (T, H, W, 3) as an H.264 mp4; the same frames and metadata always give the same bytes."""
    import av

    video, rate = to_uint8(video), exact_rate(fps)
    # yuv420p holds even sizes only
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        if metadata:
            container.metadata["comment"] = json.dumps(metadata)
        # one thread alone leaves x264's macroblock tree to rounding that differs from run to run; this does not
        options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4(
    path: str | Path, video: np.ndarray, fps: float = 8, crf: int = 16, metadata: Mapping | None = None
) -> None:
    """Write frames (T, H, W, 3) as H.264; the metadata become its comment."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(encode_mp4(video, fps, crf, metadata))


def write_gif(path: str | Path, video: np.ndarray, fps: float = 8, metadata: Mapping | None = None) -> None:
    """Write frames (T, H, W, 3) as an endless GIF; the metadata become its comment.

    A GIF counts in hundredths of a second: delays alternate, so that the clip lasts as long as it should. Above 50
    frames per second it cannot; it then plays 50, and a warning says so. Equal frames in a row may be one that stays.
    """
    unit, shortest = _GIF_DELAYS
    if check_fps(fps) > (fastest := 1 / (unit * shortest)):
        slower = f"asked for {fps:g}, it lasts {float(fps / fastest):.3g} times as long"
        warnings.warn(f"a GIF plays {fastest} frames per second at most: {slower}", stacklevel=2)
    comment = {"comment": json.dumps(metadata)} if metadata else {}
    _write_animation(path, video, fps, _GIF_DELAYS, format="GIF", **comment)


def write_webp(path: str | Path, video: np.ndarray, fps: float = 8, metadata: Mapping | None = None) -> None:
    """Write frames (T, H, W, 3) as an endless WebP; the metadata become the description in its EXIF.

    It counts in milliseconds. Where all frames are equal it becomes a picture, which has no delays.
    """
    exif = Image.Exif()
    if metadata:
        exif[_EXIF_DESCRIPTION] = json.dumps(metadata)
    _write_animation(path, video, fps, _WEBP_DELAYS, format="WEBP", quality=90, exif=exif)


def _write_animation(path: str | Path, video: np.ndarray, fps: float, kind: tuple[Fraction, int], **options) -> None:
    """The sum of the delays is never off by more than half a unit, unless the shortest makes the clip slower."""
    unit, shortest = kind
    frames = [Image.fromarray(frame) for frame in to_uint8(video)]
    step = max(float(1 / (Fraction(float(check_fps(fps))) * unit)), shortest)
    delays = np.diff(np.round(np.arange(len(frames) + 1) * step).astype(int) * int(unit * 1000)).tolist()
    options |= dict(save_all=True, append_images=frames[1:], duration=delays, loop=0)
    with atomic_file(path) as temporary:
        frames[0].save(temporary, **options)


def write_png(path: str | Path, video: np.ndarray, fps: float = 8, metadata: Mapping | None = None) -> None:
    """Write all frames (T, H, W, 3) into one picture, eight to a row; a picture has no use for `fps`."""
    write_image(path, contact_sheet(video), metadata)


def write_image(path: str | Path, image: Image.Image, metadata: Mapping | None = None) -> None:
    """Write a PNG; the metadata become its comment."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, got {type(image).__name__}; of a video contact_sheet() makes one")
    text = PngInfo()
    if metadata:
        text.add_text("Comment", json.dumps(metadata))
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def write_frames(path: str | Path, video: np.ndarray, fps: float = 8, metadata: Mapping | None = None) -> None:
    """Write frames (T, H, W, 3) as `0001.png`, `0002.png`, … of a folder, the metadata as its `metadata.json`."""
    video, path = to_uint8(video), Path(path)
    check_frames_folder(path)
    with atomic_folder(path) as temporary:
        for number, frame in enumerate(video, start=1):
            Image.fromarray(frame).save(temporary / f"{number:04d}.png")
        if metadata:
            (temporary / _METADATA_FILE).write_text(json.dumps(metadata) + "\n", encoding="utf-8")


def check_frames_folder(path: Path) -> None:
    """`ValueError` if `write_frames` would not put its folder there, since something else than frames is."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder of frames, or none yet, at {path}, which is a file")
    foreign = [p.name for p in path.glob("*") if not re.fullmatch(rf"\d+\.png|{re.escape(_METADATA_FILE)}", p.name)]
    if foreign:
        raise ValueError(f"expected a folder of frames, or none yet, at {path}; it also holds {foreign[0]!r}")


WRITERS: dict[str, Callable] = {".mp4": write_mp4, ".gif": write_gif, ".webp": write_webp, ".png": write_png}


def writer_for(path: str | Path) -> Callable:
    """The function that writes the format of the path's extension; that of a folder is none."""
    suffix = Path(path).suffix.lower()
    if names_folder(path) or not suffix:
        return write_frames
    if suffix not in WRITERS:
        raise ValueError(
            f"expected a file name ending in {', '.join(WRITERS)}, got {str(path)!r}; a folder is written with a"
            f" slash at its end: '{path}/'"
        )
    return WRITERS[suffix]


def names_folder(path: str | Path) -> bool:
    """Whether a path says by a slash at its end that it is a folder, or one is there; its name may hold dots."""
    return os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path)


def write_video(path: str | Path, video: np.ndarray, fps: float = 8, metadata: Mapping | None = None) -> None:
    """Write frames (T, H, W, 3), float in [0, 1] or uint8, in the format of the path's extension.

    Without an extension, or with a slash at the end, as a folder of frames. `fps` is from 0.01 to 1000.
    `metadata` is what JSON can say; `read_metadata` reads it back.
    """
    check_fps(fps)
    writer_for(path)(path, video, fps=fps, metadata=metadata)


def read_metadata(path: str | Path) -> dict | None:
    """The metadata that `write_video` put into a file or folder; `None` if there are none, or it is no video."""
    path = Path(path)
    text: str | bytes | None
    try:
        if path.is_dir():
            text = (path / _METADATA_FILE).read_text(encoding="utf-8")
        elif path.suffix.lower() == ".mp4":
            text = _mp4_comment(path)
        else:
            with Image.open(path) as image:
                text = image.info.get("comment") or image.info.get("Comment") or image.getexif().get(_EXIF_DESCRIPTION)
        found = json.loads(text) if text else None
    except (OSError, ValueError):  # missing, damaged, or somebody else's
        return None
    return found if isinstance(found, dict) else None


def _mp4_comment(path: Path) -> str | None:
    import av

    try:
        with av.open(os.path.join(os.curdir, path)) as container:  # or "red: a-0.mp4" names a protocol
            return container.metadata.get("comment")
    except av.error.FFmpegError as error:  # not each of which is an OSError or a ValueError
        raise ValueError(f"{path} is no mp4: {error}") from error


def contact_sheet(video: np.ndarray, columns: int = 8) -> Image.Image:
    """All frames (T, H, W, 3) of one video in reading order."""
    video = to_uint8(video)
    columns = min(columns, len(video))
    tiles = np.pad(video, ((0, -len(video) % columns), (_MARGIN, 0), (_MARGIN, 0), (0, 0)), constant_values=255)
    rows = [np.concatenate(row, axis=1) for row in tiles.reshape(-1, columns, *tiles.shape[1:])]
    return Image.fromarray(np.pad(np.concatenate(rows), ((0, _MARGIN), (0, _MARGIN), (0, 0)), constant_values=255))


def comparison(
    rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str], frames_per_video: int = 4
) -> Image.Image:
    """A labelled picture: one row per method, one group of evenly spaced frames per prompt, below its title.

    `rows` maps a label to videos (T, H, W, 3), one per title and all of one size.
    """
    if not rows or not titles or any(len(videos) != len(titles) for videos in rows.values()):
        counts = {label: len(videos) for label, videos in rows.items()}
        raise ValueError(f"expected {len(titles)} videos (one per title, at least one) in every row, got {counts}")
    font = ImageFont.load_default(size=12)
    _, height, width, _ = next(iter(rows.values()))[0].shape
    group = frames_per_video * (width + 1) + 2 * _MARGIN
    title_lines = [_wrap(title, font, group - 2 * _MARGIN) for title in titles]
    top = _MARGIN + 15 * max(len(lines) for lines in title_lines)
    size = (_LABEL_WIDTH + group * len(titles), top + (height + _MARGIN) * len(rows) + _MARGIN)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(title_lines):
        draw.multiline_text((_LABEL_WIDTH + column * group, 2), "\n".join(lines), fill="black", font=font, spacing=2)
    for row, (label, videos) in enumerate(rows.items()):
        y = top + row * (height + _MARGIN)
        label_text = "\n".join(_wrap(label, font, _LABEL_WIDTH - 3 * _MARGIN))
        draw.multiline_text((2 * _MARGIN, y + height / 2), label_text, fill="black", font=font, anchor="lm")
        for column, video in enumerate(videos):
            chosen = np.linspace(0, len(video) - 1, frames_per_video).round().astype(int)
            for place, frame in enumerate(to_uint8(video)[chosen]):
                picture.paste(Image.fromarray(frame), (_LABEL_WIDTH + column * group + place * (width + 1), y))
    return picture


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break a text into lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
