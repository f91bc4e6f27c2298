"""Motion read from pixels alone, without any network: how much changes, and how much of that is taken back at once."""

import numpy as np

STILL = 0.5  # levels of 255 a frame, below which a clip counts as near still
#: Name -> what it says, in the order in which they are shown.
MEASURES = {
    "change": "mean absolute difference of consecutive frames, in levels of 255",
    "near_still": f"share of clips that change by less than {STILL} levels a frame",
    "flicker": "the part of a pixel's change that the next frame takes back, in levels of 255",
}


def motion_of(frames: np.ndarray) -> np.ndarray:
    """What `MEASURES` names, of one clip.

    Flicker is min(|d_t|, |d_{t+1}|) where the changes d_t and d_{t+1} of a pixel have opposite signs: an edge that
    moves on has none, a brightness that alternates has all of its change.

    Args:
        frames: uint8 (T, H, W, 3), T at least 3.

    Returns:
        float64 (3,): change, near_still (0 or 1) and flicker.
    """
    if frames.ndim != 4 or len(frames) < 3:
        raise ValueError(f"expected at least 3 frames (T, H, W, 3), got {frames.shape}")
    steps = np.diff(frames.astype(np.int16), axis=0)
    change = np.abs(steps).mean()
    before, after = steps[:-1], steps[1:]
    back = np.where(np.sign(before) == -np.sign(after), np.minimum(np.abs(before), np.abs(after)), 0)
    return np.array([change, change < STILL, back.mean()], dtype=np.float64)
