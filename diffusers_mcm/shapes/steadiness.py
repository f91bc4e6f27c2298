"""Measures whether a shape stays itself from frame to frame, which a vote over the frames hides."""

from collections.abc import Sequence

import numpy as np

MIN_DISTANCE = 0.3  # of a shape's pixel from the background, Euclidean in RGB of [0, 1]
MIN_PIXELS = 12  # of a mask that is compared
MIN_PAIRS = 5  # of neighbouring frames, below which nothing is said of a clip
SIDE = 48  # cells of the grid on which two masks are compared
REACH = 2.2  # width of that grid, in square roots of the mask's area


def identity_kept(shapes: Sequence[str | None]) -> bool:
    """Whether a clip's every frame reads as the same shape; a frame that reads as none is not the same.

    Args:
        shapes: per frame the word of its shape, or None.
    """
    return None not in shapes and len(set(shapes)) == 1


def wobble(frames: np.ndarray, left_out: np.ndarray | None = None) -> float:
    """How much the outline changes from frame to frame: the mean of 1 − IoU of neighbouring frames' masks.

    Each mask is centred on its centroid and scaled by the square root of its area, so that neither moving nor growing
    is a change. A frame whose mask touches the border, or has fewer than 12 pixels, is passed over.

    Args:
        frames: array (T, H, W, 3), RGB in [0, 255], uint8 or float.
        left_out: bool (H, W), such as where a watermark lies. It counts as outside of the picture: no mask has a part
            of it, and a mask that touches it is passed over.

    Returns:
        0 for an outline that stays as it is, at most 1; NaN where fewer than 5 pairs of neighbours can be compared.
    """
    frames = np.asarray(frames, dtype=np.float32) / 255
    inside = np.ones(frames.shape[1:3], dtype=bool) if left_out is None else ~left_out
    outlines = [_outline(mask) if _whole(mask, inside) else None for mask in _masks(frames) & inside]
    changes = [_change(one, other) for one, other in zip(outlines, outlines[1:]) if one is not None is not other]
    return float(np.mean(changes)) if len(changes) >= MIN_PAIRS else float("nan")


def _masks(frames: np.ndarray) -> np.ndarray:
    """Pixels far from the background (T, H, W), which is the median of the two upper corners of a frame."""
    side = max(2, frames.shape[1] // 12)
    corners = np.concatenate([frames[:, :side, :side], frames[:, :side, -side:]], axis=2)
    background = np.median(corners.reshape(len(frames), -1, 3), axis=1)
    return np.linalg.norm(frames - background[:, None, None], axis=-1) > MIN_DISTANCE


def _whole(mask: np.ndarray, inside: np.ndarray) -> bool:
    """Whether a mask (H, W) is large enough and touches nothing that is not `inside`, such as the border."""
    padded = np.pad(inside, 1)
    free = inside.copy()
    free[0], free[-1], free[:, 0], free[:, -1] = False, False, False, False
    for rows, columns in ((slice(2, None), slice(1, -1)), (slice(-2), slice(1, -1))):
        free &= padded[rows, columns] & padded[columns, rows]
    return mask.sum() >= MIN_PIXELS and not (mask & ~free).any()


def _outline(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W), centred and scaled: bool (SIDE, SIDE), what lies beyond the picture False."""
    rows, columns = np.nonzero(mask)
    offsets = REACH * np.sqrt(len(rows)) * ((np.arange(SIDE) + 0.5) / SIDE - 0.5)
    y, x = (np.rint(centre + offsets).astype(int) for centre in (rows.mean(), columns.mean()))
    reached = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))
    return mask[np.ix_(y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1))] & reached


def _change(one: np.ndarray, other: np.ndarray) -> float:
    """1 − intersection over union of two masks."""
    return 1 - (one & other).sum() / (one | other).sum()
