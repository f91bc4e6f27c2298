"""Renders the shapes world: poor videos, good images, and the truth they were drawn from."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .captions import BACKGROUNDS, COLOURS, MOTIONS, Caption, parse

DOMAINS = ("video", "clean", "cartoon", "pastel")
OUTLINE = (20, 20, 20)  # cartoon, RGB
OUTLINE_WIDTH = 0.035  # of the picture's width
PASTEL_WHITE = 0.45  # share of white in a pastel colour
BLUR = 1.1 / 64  # Gaussian deviation of the video domain, of the picture's width
WATERMARK_LEVEL = 55  # grey levels between the watermark and what is behind it

# one bit per stroke cell, 3 by 5 cells a letter
_LETTERS = {
    "S": "111 100 111 001 111",
    "A": "111 101 111 101 101",
    "M": "101 111 111 101 101",
    "P": "111 101 111 100 100",
    "L": "100 100 100 100 111",
    "E": "111 100 111 100 111",
}
_WATERMARK_TEXT = "SAMPLE"


class Trajectory(NamedTuple):
    """Where a shape is: centre (T, 2) as x, y and radius (T,), all as shares of the picture's width."""

    centre: np.ndarray
    radius: np.ndarray


@lru_cache(maxsize=4)
def watermark(size: int = 64) -> np.ndarray:
    """The watermark of the video domain, float32 (size, size) in [-1, 1]: +1 on strokes, -1 on their shadow."""
    rows = [[int(bit) for bit in "0".join(_LETTERS[c].split()[row] for c in _WATERMARK_TEXT)] for row in range(5)]
    scale = max(1, round(size / 32))
    strokes = np.kron(np.array(rows, dtype=np.float32), np.ones((scale, scale), dtype=np.float32))
    pattern = np.zeros((size, size), dtype=np.float32)
    top, left = round(0.68 * size), (size - strokes.shape[1]) // 2
    shadow = np.roll(np.pad(strokes, (0, scale // 2 + 1)), (scale // 2 + 1,) * 2, (0, 1))
    pattern[top : top + shadow.shape[0], left : left + shadow.shape[1]] -= shadow
    area = pattern[top : top + strokes.shape[0], left : left + strokes.shape[1]]
    area[strokes > 0] = 1
    return pattern


def trajectory(caption: Caption | str, seed: int, num_frames: int = 16) -> Trajectory:
    """The truth behind `render_video`: where the shape is in each frame.

    The radius is 0.16 to 0.24 of the width and the path 0.3 to 0.6; areas that grow or shrink do so at least twofold.
    """
    caption = parse(caption)
    rng = np.random.default_rng([seed, *map(ord, str(caption))])
    radius = rng.uniform(0.16, 0.24)
    progress = np.linspace(0, 1, num_frames) if num_frames > 1 else np.array([0.5])
    direction = np.array(MOTIONS[caption.motion], dtype=np.float64)
    if direction.any():
        length = rng.uniform(0.3, min(0.6, 1 - 2 * radius))
        middle = np.where(
            direction != 0, rng.uniform(radius + length / 2, 1 - radius - length / 2), rng.uniform(radius, 1 - radius)
        )
        centre = middle + (progress[:, None] - 0.5) * length * direction
        return Trajectory(centre, np.full(num_frames, radius))
    ratio = rng.uniform(1.45, 1.8)  # of radii
    exponent = (progress - 0.5) * (1 if caption.motion == "growing" else -1)
    radii = radius * ratio**exponent
    place = rng.uniform(radii.max(), 1 - radii.max(), size=2)
    return Trajectory(np.repeat(place[None], num_frames, 0), radii)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the shape's edge, negative inside; `x`, `y` are relative to its centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    # an upright equilateral triangle: the farthest of its three half planes
    inner = 0.58 * radius
    slope = np.sqrt(3) / 2 * np.abs(x) - 0.5 * (y - 0.22 * radius)
    return np.maximum(slope, y - 0.22 * radius) - inner


def render_video(
    caption: Caption | str, seed: int, domain: str = "video", size: int = 64, num_frames: int = 16
) -> np.ndarray:
    """One clip of a caption: uint8 (num_frames, size, size, 3), RGB.

    The seed decides place, size and speed; the same one gives the same trajectory in every domain. `video` is poor
    (blurred, with a watermark); `clean`, `cartoon` and `pastel` are good.
    """
    return _paint(parse(caption), trajectory(caption, seed, num_frames), domain, size)


def render_image(caption: Caption | str, seed: int, domain: str = "clean", size: int = 64) -> np.ndarray:
    """One frame of a caption's clip, drawn at a random moment of it: uint8 (size, size, 3), RGB."""
    whole = trajectory(caption, seed, 16)
    moment = np.random.default_rng([seed, 1]).integers(16)
    frame = Trajectory(whole.centre[moment : moment + 1], whole.radius[moment : moment + 1])
    return _paint(parse(caption), frame, domain, size)[0]


def colours(caption: Caption, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and background of a domain, float32 RGB in [0, 255]."""
    colour = np.array(COLOURS[caption.colour], dtype=np.float32)
    background = np.array(BACKGROUNDS[caption.background], dtype=np.float32)
    if domain == "pastel":
        colour = colour + PASTEL_WHITE * (255 - colour)
    if domain == "cartoon":
        colour = colour * 255 / colour.max()
    return colour, background


def _paint(caption: Caption, path: Trajectory, domain: str, size: int) -> np.ndarray:
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    grid = (np.arange(size) + 0.5) / size
    x = grid[None, None, :] - path.centre[:, 0, None, None]
    y = grid[None, :, None] - path.centre[:, 1, None, None]
    distance = signed_distance(caption.shape, x, y, path.radius[:, None, None])
    colour, background = colours(caption, domain)

    def coverage(offset: float | np.ndarray) -> np.ndarray:
        return np.clip(0.5 - (distance + offset) * size, 0, 1)[..., None].astype(np.float32)

    frames = background + coverage(0) * (colour - background)
    if domain == "cartoon":
        # a ring has a thin band: leave half of it to the colour
        width = np.minimum(OUTLINE_WIDTH, (0.13 if caption.shape == "ring" else np.inf) * path.radius)
        frames = background + coverage(0) * (np.array(OUTLINE, dtype=np.float32) - background)
        frames = frames + coverage(width[:, None, None]) * (colour - frames)
    if domain == "video":
        frames = _blur(frames, BLUR * size)
        frames = frames + WATERMARK_LEVEL * watermark(size)[None, :, :, None]
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _blur(frames: np.ndarray, deviation: float) -> np.ndarray:
    """Separable Gaussian blur of (T, H, W, 3) with replicated borders."""
    reach = int(np.ceil(3 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (1, 2):
        near = np.arange(frames.shape[axis])[:, None] + np.arange(-reach, reach + 1)  # (length, kernel)
        near = near.clip(0, frames.shape[axis] - 1)
        frames = sum(k * np.take(frames, places, axis) for k, places in zip(kernel, near.T))
    return frames
