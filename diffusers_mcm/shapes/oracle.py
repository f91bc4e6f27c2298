"""Reads what a clip of the shapes world shows off its pixels: no network, and no look at the prompt.

The reading is strict where a picture is wrong and lenient where it is only imperfect: colours may be off and outlines
may wobble, but one shape of one colour has to be there in every part of the clip.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .captions import BACKGROUNDS, COLOURS, MOTIONS, Caption, parse
from .render import WATERMARK_LEVEL, colours, signed_distance, watermark
from .steadiness import identity_kept, wobble

WATERMARK_SEEN = 0.25  # strength from which a watermark counts as seen; 1 is that of the video domain
MIN_CHROMA = 30.0  # a pixel this far from the background in chroma belongs to a shape, grey levels
MAX_COLOUR_DISTANCE = 80.0  # from the nearest colour of a palette, grey levels
MAX_BACKGROUND_DISTANCE = 50.0
MIN_FIT = 0.72  # intersection over union of a frame's shape and its ideal
MIN_HOLE = 0.3  # inner over outer radius from which a disc is a ring
MAX_STRAY = 0.2  # share of a shape that may have a colour other than its own, its outline's or the background's
MIN_PATH = 0.15  # of the width, over the clip: half the shortest true path
MIN_GROWTH = np.log(1.2)  # of radii, over the clip: half the smallest true growth
MIN_STRAIGHTNESS = 0.8  # share of the variance in time that a constant speed explains


class Reading(NamedTuple):
    """What the oracle reads; an attribute that cannot be told is None.

    Attributes:
        colour, shape, motion, background: words of the caption grammar.
        displacement: speed along the motion in shares of the width per frame, never negative; for a growing or
            shrinking shape that of its edge.
        positions: float (T, 2), centre as x, y in shares of the width; NaN in a frame without a shape.
        radii: float (T,), radius in shares of the width; NaN in a frame without a shape.
        watermark: strength, 1 for that of the video domain, about 0 without one.
        watermark_seen: whether the strength reaches `WATERMARK_SEEN`.
        sharpness: mean slope of the edges over their contrast, per pixel; higher is sharper, NaN without a shape.
        flicker: mean change from frame to frame that motion does not explain, as a share of the full range.
        fit: mean intersection over union of the shape and its ideal, 0 to 1.
        identity_kept: whether every frame reads as the same shape.
        wobble: how much the outline changes from frame to frame, 0 to 1, without the watermark's zone where one is
            seen; NaN where it cannot be told.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    displacement: float
    positions: np.ndarray
    radii: np.ndarray
    watermark: float
    watermark_seen: bool
    sharpness: float
    flicker: float
    fit: float
    identity_kept: bool
    wobble: float


def all_right(reading: Reading, caption: Caption | str) -> bool:
    """Whether colour, shape, motion and background are all the caption's."""
    caption = parse(caption)
    return appearance_right(reading, caption) and reading.motion == caption.motion


def appearance_right(reading: Reading, caption: Caption | str) -> bool:
    """Whether colour, shape and background are the caption's: all that one image can show."""
    caption = parse(caption)
    return (reading.colour, reading.shape, reading.background) == (caption.colour, caption.shape, caption.background)


def read_image(image: np.ndarray) -> Reading:
    """Read one image, uint8 (H, W, 3); its motion is None."""
    return read_video(np.asarray(image)[None])


def read_video(frames: np.ndarray) -> Reading:
    """Read a clip.

    Args:
        frames: uint8 array (T, H, W, 3), RGB, square frames.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"expected square uint8 frames (T, H, W, 3), got {frames.dtype} {frames.shape}")
    frames = frames.astype(np.float32)
    zone = _watermark_zone(frames.shape[1])
    background = _border_colour(frames)
    difference = frames - background[:, None, None]
    foreground, present = _foreground_colour(frames, difference)
    contrast = foreground - background
    coverage = _chromatic_coverage(difference, contrast)
    strength = _watermark_strength(frames, background, foreground, coverage)
    # any difference counts as shape, but chroma alone where a watermark would be taken for one
    deviation = _norm(difference) / np.maximum(_norm(contrast), 1)[:, None, None]
    if strength >= WATERMARK_SEEN:
        deviation = np.where(zone, coverage, deviation)
    mask = (deviation > 0.5) & present[:, None, None]
    shapes, fits, centres, radii = _fit_shapes(mask)
    own = present & (_stray_share(frames, background, foreground, mask, strength) <= MAX_STRAY)
    named = [_nearest_colour(colour) if one else None for colour, one in zip(foreground, own)]
    motion, displacement = _read_motion(centres, radii)
    return Reading(
        colour=_agreed(named),
        shape=_agreed(shapes),
        motion=motion,
        background=_agreed([_nearest_background(level) for level in background]),
        displacement=displacement,
        positions=centres,
        radii=radii,
        watermark=strength,
        watermark_seen=strength >= WATERMARK_SEEN,
        sharpness=_sharpness(frames, mask),
        flicker=_flicker(frames, foreground, mask, deviation),
        fit=float(fits.mean()),
        identity_kept=identity_kept(shapes),
        wobble=wobble(frames, zone if strength >= WATERMARK_SEEN else None),
    )


def _border_colour(frames: np.ndarray) -> np.ndarray:
    """Background of each frame (T, 3): the median of its border, which a shape at most touches."""
    width = max(1, frames.shape[1] // 32)
    rows = np.concatenate([frames[:, :width], frames[:, -width:]], axis=1)
    columns = np.concatenate([frames[:, width:-width, :width], frames[:, width:-width, -width:]], axis=2)
    count = len(frames)
    return np.median(np.concatenate([rows.reshape(count, -1, 3), columns.reshape(count, -1, 3)], axis=1), axis=1)


def _chroma(colour: np.ndarray) -> np.ndarray:
    """A colour without its grey part: blind to the watermark, which adds grey."""
    return colour - (colour[..., :1] + colour[..., 1:2] + colour[..., 2:]) / 3


def _foreground_colour(frames: np.ndarray, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour of each frame's most colourful part (T, 3), and whether there is such a part (T,)."""
    distance = _norm(_chroma(difference))
    outside = ~_watermark_zone(frames.shape[1])
    foreground = np.zeros((len(frames), 3), dtype=np.float32)
    present = np.zeros(len(frames), dtype=bool)
    fewest = max(4, frames.shape[1] ** 2 // 400)
    strongest = np.partition(distance.reshape(len(frames), -1), -fewest, axis=1)[:, -fewest]
    for t in np.flatnonzero(strongest >= MIN_CHROMA):
        core = distance[t] > 0.85 * strongest[t]
        if (core & outside).sum() >= fewest:
            core &= outside
        middle = np.count_nonzero(core) // 2
        foreground[t], present[t] = np.sort(frames[t][core], axis=0)[middle], True
    return foreground, present


def _chromatic_coverage(difference: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Share of the shape in each pixel (T, H, W), from chroma alone."""
    direction = _chroma(contrast)
    square = np.maximum((direction**2).sum(axis=-1), MIN_CHROMA**2)
    return np.einsum("thwc,tc->thw", difference, direction / square[:, None])


def _stray_share(frames, background, foreground, mask, strength) -> np.ndarray:
    """Share of each frame's shape (T,) that no mixture of its colour, the background and black explains."""
    normal = np.cross(background, foreground)
    normal /= np.maximum(_norm(normal), 1e-6)[:, None]
    across = (
        foreground - background * ((foreground * background).sum(axis=1) / (background**2 + 1e-6).sum(axis=1))[:, None]
    )
    across /= np.maximum((across**2).sum(axis=1), 1e-6)[:, None]
    flat = frames.reshape(len(frames), -1, 3)
    residual, part = np.moveaxis(flat @ np.stack([normal, across], axis=2), -1, 0).reshape(2, *mask.shape)
    limit = 0.35 * np.maximum(_norm(_chroma(foreground - background)), MIN_CHROMA)
    stray = (np.abs(residual) > limit[:, None, None]) | (part < -0.3)
    if strength >= WATERMARK_SEEN:
        stray &= ~_watermark_zone(frames.shape[1])
    return (stray & mask).sum(axis=(1, 2)) / np.maximum(mask.sum(axis=(1, 2)), 1)


@lru_cache(maxsize=4)
def _watermark_zone(size: int) -> np.ndarray:
    """Where the watermark is, and a little around it: bool (size, size)."""
    return _grow((watermark(size) != 0)[None], max(1, size // 64))[0]


def _grow(mask: np.ndarray, reach: int) -> np.ndarray:
    """Dilate (T, H, W) by a square of half width `reach`."""
    for _ in range(reach):
        for axis in (1, 2):
            low = [slice(None)] * 3
            high = [slice(None)] * 3
            low[axis], high[axis] = slice(None, -1), slice(1, None)
            grown = mask.copy()
            grown[tuple(low)] |= mask[tuple(high)]
            grown[tuple(high)] |= mask[tuple(low)]
            mask = grown
    return mask


def _watermark_strength(frames, background, foreground, coverage) -> float:
    """Matched filter: regression of what lies over the flat colours on what a full watermark would add to them."""
    size = frames.shape[1]
    pattern = watermark(size)
    used = np.flatnonzero(np.abs(pattern).sum(axis=1))
    rows = slice(used[0], used[-1] + 1)
    pattern = pattern[None, rows, :, None]
    reach = max(1, size // 32)
    covered = coverage > 0.3
    inside = ~_grow(~(coverage > 0.7), reach)[:, rows]
    flat = inside | ~_grow(covered, reach)[:, rows]
    under = np.where(inside[..., None], foreground[:, None, None], background[:, None, None])
    added = (frames[:, rows] - under).mean(axis=-1)
    expected = (np.clip(under + WATERMARK_LEVEL * pattern, 0, 255) - under).mean(axis=-1)
    columns = np.abs(pattern[0, ..., 0]).sum(axis=0) > 0
    weight = flat & columns
    total = weight.sum()
    if total < size:
        return 0.0
    expected = np.where(weight, expected - (expected * weight).sum() / total, 0)
    return float((added * expected).sum() / max((expected**2).sum(), 1e-6))


def _fit_shapes(mask: np.ndarray):
    """Per frame: the shape whose ideal of the same centre and area fits best, how well, its centre and radius."""
    count, size = mask.shape[:2]
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    area = mask.sum(axis=(1, 2)) / size**2
    safe = np.maximum(area, 1e-6)
    columns, rows = mask.sum(axis=1) / size**2, mask.sum(axis=2) / size**2
    x, y = columns @ grid / safe, rows @ grid / safe
    spread = columns @ grid**2 / safe - x**2 + rows @ grid**2 / safe - y**2
    # a ring of radii R and qR has area pi R^2 (1 - q^2) and spread R^2 (1 + q^2) / 2
    outer = np.sqrt(np.maximum(spread + area / (2 * np.pi), 1e-6))
    inner = np.sqrt(np.maximum(spread - area / (2 * np.pi), 0))
    square, triangle = np.sqrt(area / 1.72**2), np.sqrt(area / (3 * np.sqrt(3) * 0.58**2))

    dx = grid[None, None, :] - x[:, None, None].astype(np.float32)
    dy = grid[None, :, None] - y[:, None, None].astype(np.float32)
    from_centre = np.hypot(dx, dy)
    ideals = [
        (from_centre < outer[:, None, None]) & (from_centre >= inner[:, None, None]),
        signed_distance("square", dx, dy, square[:, None, None].astype(np.float32)) < 0,
        signed_distance(
            "triangle",
            dx,
            dy + 0.22 * triangle[:, None, None].astype(np.float32),
            triangle[:, None, None].astype(np.float32),
        )
        < 0,
    ]
    fits = np.stack(
        [(mask & ideal).sum(axis=(1, 2)) / np.maximum((mask | ideal).sum(axis=(1, 2)), 1) for ideal in ideals]
    )
    best = fits.argmax(axis=0)
    round_name = np.where(inner > MIN_HOLE * outer, "ring", "circle")
    names = np.where(best == 0, round_name, np.array(["circle", "square", "triangle"])[best])
    fit = np.where(area > 0.004, fits.max(axis=0), 0)
    shapes = [str(name) if good >= MIN_FIT else None for name, good in zip(names, fit)]
    radius = np.choose(best, [outer, square, triangle])
    centre = np.stack([x, y - np.where(best == 2, 0.22 * triangle, 0)], axis=-1)
    gone = area <= 0.004
    return shapes, fit, np.where(gone[:, None], np.nan, centre), np.where(gone, np.nan, radius)


def _agreed(words: list[str | None]) -> str | None:
    """The word that three quarters of a clip's frames, and most of each quarter of the clip, agree on."""
    known = [word for word in words if word is not None]
    if not known:
        return None
    winner = max(sorted(set(known)), key=known.count)
    votes = np.array([word == winner for word in words])
    parts = np.array_split(votes, min(4, len(votes)))
    return winner if votes.mean() >= 0.75 and all(part.mean() > 0.5 for part in parts) else None


@lru_cache(maxsize=1)
def _palette() -> tuple[list[str], np.ndarray]:
    names, rows = [], []
    for name in COLOURS:
        for domain in ("clean", "cartoon", "pastel"):
            names.append(name)
            rows.append(colours(Caption(name, "circle", "growing", "black"), domain)[0])
    return names, np.stack(rows)


def _nearest_colour(colour: np.ndarray) -> str | None:
    names, rows = _palette()
    distance = np.linalg.norm(rows - colour, axis=1)
    nearest = int(distance.argmin())
    return names[nearest] if distance[nearest] <= MAX_COLOUR_DISTANCE else None


def _nearest_background(level: np.ndarray) -> str | None:
    distances = {name: float(np.linalg.norm(level - colour)) for name, colour in BACKGROUNDS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= MAX_BACKGROUND_DISTANCE else None


def _line(values: np.ndarray, time: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and the share of the variance that it explains."""
    time = time - time.mean()
    slope = float((time * values).sum() / (time**2).sum())
    variance = float(((values - values.mean()) ** 2).sum())
    return slope, slope**2 * float((time**2).sum()) / max(variance, 1e-12)


def _read_motion(centres: np.ndarray, radii: np.ndarray) -> tuple[str | None, float]:
    """The motion, if it is one of the grammar's, and its speed per frame."""
    time = np.flatnonzero(np.isfinite(radii))
    if len(time) < 3:
        return None, 0.0
    fits = [_line(centres[time, axis], time) for axis in (0, 1)]
    velocity = np.array([slope for slope, _ in fits])
    growth, steadiness = _line(np.log(radii[time]), time)
    span = len(radii) - 1
    path, main = np.abs(velocity) * span, int(np.abs(velocity).argmax())
    if len(time) < 0.9 * len(radii):
        return None, float(np.linalg.norm(velocity))
    if path[main] >= MIN_PATH:
        straight = fits[main][1] >= MIN_STRAIGHTNESS and path[1 - main] < 0.5 * path[main]
        if straight and abs(growth) * span < 1.5 * MIN_GROWTH:
            direction = tuple(int(v) for v in np.where(np.arange(2) == main, np.sign(velocity), 0))
            name = next(name for name, unit in MOTIONS.items() if unit == direction)
            return name, float(abs(velocity[main]))
    elif abs(growth) * span >= MIN_GROWTH and steadiness >= MIN_STRAIGHTNESS:
        return "growing" if growth > 0 else "shrinking", abs(_line(radii[time], time)[0])
    return None, float(np.linalg.norm(velocity))


def _sharpness(frames: np.ndarray, mask: np.ndarray) -> float:
    """Slope of the edges over the local contrast, weighted by the slope; free of colour, size and background."""
    band = (_grow(mask, 3) & _grow(~mask, 3))[:, 1:-1, 1:-1]
    clear = band & ~_watermark_zone(frames.shape[1])[1:-1, 1:-1]
    band = clear if clear.sum() >= 0.25 * band.sum() else band
    if not band.any():
        return float("nan")
    planes = np.ascontiguousarray(np.moveaxis(frames, -1, 0))
    for axis in (2, 3):  # evens out where an edge falls between pixels
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = np.pad(planes, padding, mode="edge")
        left, right = np.split(padded, [-2], axis)[0], np.split(padded, [2], axis)[1]
        planes = 0.25 * (left + right) + 0.5 * planes
    across = (planes[:, :, 1:-1, 2:] - planes[:, :, 1:-1, :-2]) / 2
    down = (planes[:, :, 2:, 1:-1] - planes[:, :, :-2, 1:-1]) / 2
    slope = np.sqrt((across**2 + down**2).sum(axis=0))[band]
    contrast = _local_range(planes, 3)[:, 1:-1, 1:-1][band]
    return float((slope**2).sum() / max((slope * contrast).sum(), 1e-6))


def _norm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Euclidean length over a short axis; faster than a reduction there."""
    planes = np.moveaxis(values, axis, 0)
    return np.sqrt(sum(plane * plane for plane in planes))


def _local_range(planes: np.ndarray, reach: int) -> np.ndarray:
    """Distance between the extremes of each channel within a square window: (C, T, H, W) to (T, H, W)."""
    extremes = []
    for pick in (np.maximum, np.minimum):
        best = planes
        for axis in (2, 3):
            padding = [(0, 0)] * 4
            padding[axis] = (reach, reach)
            best = np.pad(best, padding, mode="edge")
            length = planes.shape[axis]
            shifts = [best[(slice(None),) * axis + (slice(i, i + length),)] for i in range(2 * reach + 1)]
            best = shifts[0].copy()
            for shifted in shifts[1:]:
                pick(best, shifted, out=best)
        extremes.append(best)
    return _norm(extremes[0] - extremes[1], axis=0)


def _flicker(frames: np.ndarray, foreground: np.ndarray, mask: np.ndarray, deviation: np.ndarray) -> float:
    """Change of the background's pixels and of the shape's colour, plus wobble of its size, per frame."""
    if len(frames) < 3:
        return 0.0
    still = ~_grow(mask, 4)
    still = still[1:] & still[:-1]
    change = np.abs(np.diff(frames, axis=0)) @ np.full(3, 1 / 3, dtype=np.float32)
    behind = float((change * still).sum() / max(still.sum(), 1)) / 255
    within = float(np.abs(np.diff(foreground, axis=0)).mean()) / 255
    # partly covered pixels count in part: a hard mask's area jumps when a straight edge crosses a row
    widths = np.sqrt((np.clip(deviation, 0, 1) * _grow(mask, 2)).sum(axis=(1, 2)))
    wobble = float(np.abs(np.diff(widths, 2)).mean() / max(widths.mean(), 1))
    return behind + within + wobble
