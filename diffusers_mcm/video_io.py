"""Writing what was sampled: H.264, GIF, contact sheets and labelled comparisons. Whole files or none."""

import io
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import whole_file

_MARGIN = 4
_LABEL_WIDTH = 190


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3), float in [0, 1] or uint8 -> uint8 in [0, 255]."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"expected frames of shape (T, H, W, 3), none of them 0, got {video.shape}")
    if video.dtype == np.uint8:
        return video
    return (video.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def encode_mp4(video: np.ndarray, fps: float = 8, crf: int = 16) -> bytes:
    """Frames (T, H, W, 3) as an H.264 mp4; the same frames always give the same bytes."""
    import av

    video = to_uint8(video)
    # yuv420p holds even sizes only
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # one thread alone leaves x264's macroblock tree to rounding that differs from run to run; this does not
        options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4(path: str | Path, video: np.ndarray, fps: float = 8, crf: int = 16) -> None:
    """Write frames (T, H, W, 3) as H.264; the same frames always give the same bytes."""
    with whole_file(path) as temporary:
        temporary.write_bytes(encode_mp4(video, fps, crf))


def write_gif(path: str | Path, video: np.ndarray, fps: float = 8) -> None:
    """Write frames (T, H, W, 3) as an endless GIF."""
    frames = [Image.fromarray(frame) for frame in to_uint8(video)]
    with whole_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0
        )


def write_png(path: str | Path, video: np.ndarray, fps: float = 8) -> None:
    """Write all frames (T, H, W, 3) into one picture, eight to a row; a picture has no use for `fps`."""
    write_image(path, contact_sheet(video))


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a PNG."""
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


WRITERS: dict[str, Callable] = {".mp4": write_mp4, ".gif": write_gif, ".png": write_png}


def writer_for(path: str | Path) -> Callable:
    """The function that writes the format of the path's extension."""
    try:
        return WRITERS[Path(path).suffix.lower()]
    except KeyError:
        raise ValueError(f"expected a file name ending in {', '.join(WRITERS)}, got {str(path)!r}") from None


def write_video(path: str | Path, video: np.ndarray, fps: float = 8) -> None:
    """Write frames (T, H, W, 3), float in [0, 1] or uint8, in the format of the path's extension."""
    writer_for(path)(path, video, fps=fps)


def contact_sheet(video: np.ndarray, columns: int = 8) -> Image.Image:
    """All frames (T, H, W, 3) of one video in reading order."""
    video = to_uint8(video)
    length, height, width, _ = video.shape
    columns = min(columns, length)
    rows = -(-length // columns)
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    for index, frame in enumerate(video):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(frame), (_MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN)))
    return sheet


def comparison(
    rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str], frames_per_video: int = 4
) -> Image.Image:
    """A labelled picture: one row per method, one group of evenly spaced frames per prompt.

    Args:
        rows: label -> videos (T, H, W, 3), one per title and all of one size.
        titles: the prompts, above their columns.
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
        lines = "\n".join(_wrap(label, font, _LABEL_WIDTH - 3 * _MARGIN))
        draw.multiline_text((2 * _MARGIN, y + height / 2), lines, fill="black", font=font, anchor="lm")
        for column, video in enumerate(videos):
            video = to_uint8(video)
            chosen = np.linspace(0, len(video) - 1, frames_per_video).round().astype(int)
            for place, index in enumerate(chosen):
                picture.paste(Image.fromarray(video[index]), (_LABEL_WIDTH + column * group + place * (width + 1), y))
    return picture


def _wrap(text: str, font: ImageFont.ImageFont, width: float) -> list[str]:
    """Break a text into lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
