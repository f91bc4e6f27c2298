import math

import numpy as np
import pytest

from diffusers_mcm.shapes.captions import all_captions
from diffusers_mcm.shapes.oracle import read_video
from diffusers_mcm.shapes.render import render_video, signed_distance
from diffusers_mcm.shapes.steadiness import identity_kept, wobble

RED, BLACK = (230, 25, 25), (13, 13, 13)


def inside(shape, x, y, radius, size=64):
    """The pixels (size, size) of a shape at x, y, all in shares of the width."""
    grid = (np.arange(size) + 0.5) / size
    return signed_distance(shape, grid[None] - x, grid[:, None] - y, np.float64(radius)) < 0


def rectangle(width, height, size=64):
    """A centred one."""
    grid = np.abs((np.arange(size) + 0.5) / size - 0.5)
    return (grid[None] < width / 2) & (grid[:, None] < height / 2)


def paint(masks):
    """Red where the masks are, on black: uint8 (T, H, W, 3)."""
    return np.where(np.stack(masks)[..., None], RED, BLACK).astype(np.uint8)


def clip(*shapes, radius=0.2):
    return paint([inside(shape, 0.4, 0.4, radius) for shape in shapes])


@pytest.mark.parametrize(
    "shapes, kept",
    [
        (["ring"] * 4, True),
        (["ring", "ring", "circle", "ring"], False),
        (["ring", None, "ring", "ring"], False),
        ([None, None], False),
    ],
)
def test_identity_is_kept_where_every_frame_reads_as_one_shape(shapes, kept):
    assert identity_kept(shapes) is kept


def test_a_circle_that_becomes_a_square_for_one_frame_is_voted_right_but_not_kept():
    steady, turned = (read_video(clip(*["circle"] * 8, frame, *["circle"] * 7)) for frame in ("circle", "square"))
    assert (steady.shape, steady.identity_kept, steady.wobble) == ("circle", True, 0)
    assert (turned.shape, turned.identity_kept) == ("circle", False)
    assert turned.wobble > 0.01


def test_a_frame_without_a_shape_is_not_the_same():
    frames = clip(*["circle"] * 16)
    frames[7] = BLACK
    reading = read_video(frames)
    assert reading.shape == "circle" and not reading.identity_kept


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "ring"])
def test_a_rigid_translation_does_not_wobble(shape):
    assert wobble(paint([inside(shape, (20 + t) / 64, 0.5, 0.2) for t in range(16)])) == 0


def test_growth_alone_is_no_wobble():
    grown = [rectangle(2 * half / 64, 2 * half / 64) for half in (8, 10, 12, 14, 16, 18)]
    assert wobble(paint(grown)) < 0.04  # a pixel's width of a square of 16, and less of the larger ones


def test_alternating_shapes_of_equal_area_have_their_iou():
    # a cell of the grid is a twentieth of a shape's width, hence 0.03
    # unit square and the rectangle of sqrt(2) by 1 / sqrt(2): they share 1 / sqrt(2)
    square, wide = rectangle(0.25, 0.25, 256), rectangle(0.25 * math.sqrt(2), 0.25 / math.sqrt(2), 256)
    shared = 1 / math.sqrt(2)
    assert wobble(paint([square, wide] * 4)) == pytest.approx(1 - shared / (2 - shared), abs=0.03)
    # a circle of area 1 leaves the unit square in four segments
    r, d = 1 / math.sqrt(math.pi), 0.5
    shared = 1 - 4 * (r**2 * math.acos(d / r) - d * math.sqrt(r**2 - d**2))
    disc = inside("circle", 0.5, 0.5, 0.25 * r, 256)
    assert wobble(paint([square, disc] * 4)) == pytest.approx(1 - shared / (2 - shared), abs=0.03)


def test_the_mean_is_over_the_pairs_that_can_be_compared():
    square, wide = rectangle(0.25, 0.25), rectangle(0.4, 0.15)
    every = wobble(paint([square, wide] * 4))
    assert wobble(paint([square] * 8 + [wide] * 2)) == pytest.approx(every / 9)
    touching = inside("square", 0.1, 0.5, 0.2)
    speck = np.zeros_like(square)
    speck[30:41, 30] = True  # 11 pixels
    for unusable in (touching, speck, np.zeros_like(square)):
        assert wobble(paint([square] * 5 + [unusable] + [wide, square, wide])) == pytest.approx(every * 2 / 6)


def test_fewer_than_five_pairs_say_nothing():
    square, touching = rectangle(0.25, 0.25), inside("square", 0.1, 0.5, 0.2)
    assert wobble(paint([square] * 6)) == 0
    assert math.isnan(wobble(paint([square] * 5)))
    assert math.isnan(wobble(paint([square] * 3 + [touching] + [square] * 3)))
    assert math.isnan(read_video(clip("circle")).wobble)


def test_what_is_near_the_background_is_no_part_of_a_mask():
    frames = clip(*["square"] * 8).astype(int)
    added = np.zeros_like(frames)
    added[::2, 50:54, 50:54] = 1
    faint, clear = 0.29 * 255 / math.sqrt(3), 0.31 * 255 / math.sqrt(3)
    assert wobble(frames + added * faint) == 0
    assert wobble(frames + added * clear) > 0.02


def test_what_is_left_out_is_outside_of_the_picture():
    zone = np.zeros((64, 64), dtype=bool)
    zone[48:56] = True
    frames = clip(*["square"] * 8)
    frames[::2, 50:54, 50:54] = 255
    assert wobble(frames) > 0.02
    assert wobble(frames, zone) == 0
    touching, clear = (paint([inside("square", 0.5, y / 64, 0.2)] * 8) for y in (37, 36))
    assert np.flatnonzero(touching[0, ..., 0].max(1) > 100)[-1] == 47
    assert math.isnan(wobble(touching, zone)) and wobble(touching) == 0
    assert wobble(clear, zone) == 0


def test_rendered_truth_is_steady_and_the_watermark_is_left_out():
    captions = all_captions()[::25]
    clean, video = (
        [read_video(render_video(caption, seed, domain)) for seed, caption in enumerate(captions)]
        for domain in ("clean", "video")
    )
    assert all(reading.identity_kept for reading in clean + video)
    assert np.mean([reading.wobble for reading in clean]) == pytest.approx(0.040, abs=0.005)
    seen = np.array([reading.wobble for reading in video])
    assert np.isfinite(seen).sum() >= 10 and np.nanmean(seen) < 0.06
