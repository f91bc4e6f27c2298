import numpy as np
import pytest

from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, all_captions, parse
from diffusers_mcm.shapes.render import (
    DOMAINS,
    WATERMARK_LEVEL,
    colours,
    render_image,
    render_video,
    signed_distance,
    trajectory,
    watermark,
)

SAMPLE = all_captions()[::31]
CIRCLE = parse("a red circle moving left on a black background")


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_draws_the_same_clip_and_another_seed_another(domain):
    first, again, other = (render_video(CIRCLE, seed, domain) for seed in (3, 3, 4))
    assert first.shape == (16, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sizes_and_paths_stay_within_the_world():
    for caption in SAMPLE:
        for seed in range(5):
            path = trajectory(caption, seed)
            low, high = path.centre - path.radius[:, None], path.centre + path.radius[:, None]
            assert low.min() >= -1e-9 and high.max() <= 1 + 1e-9
            length = np.linalg.norm(path.centre[-1] - path.centre[0])
            if caption.motion in ("growing", "shrinking"):
                area = (path.radius[-1] / path.radius[0]) ** (2 if caption.motion == "growing" else -2)
                assert length == 0 and area >= 2
            else:
                assert 0.3 <= length <= 0.6 and np.ptp(path.radius) == 0
                assert 0.16 <= path.radius[0] <= 0.24


@pytest.mark.parametrize(
    "motion, step",
    [("moving left", (-1, 0)), ("moving right", (1, 0)), ("moving up", (0, -1)), ("moving down", (0, 1))],
)
def test_a_shape_moves_where_its_caption_says(motion, step):
    video = render_video(CIRCLE._replace(motion=motion), 5, "clean").astype(float)
    weight = video[..., 0] - video[..., 0].min()
    y, x = np.mgrid[:64, :64]
    centres = [(float((w * x).sum() / w.sum()), float((w * y).sum() / w.sum())) for w in weight]
    moved = np.subtract(centres[-1], centres[0])
    assert np.dot(moved, step) >= 0.3 * 64 - 1
    assert abs(np.dot(moved, step[::-1])) < 1


@pytest.mark.parametrize("shape, share", [("circle", np.pi), ("square", 1.72**2), ("ring", np.pi * (1 - 0.48**2))])
def test_shapes_have_the_area_of_their_formula(shape, share):
    x, y = np.meshgrid(np.linspace(-1, 1, 801), np.linspace(-1, 1, 801))
    inside = (signed_distance(shape, x, y, 0.9) < 0).mean() * 4
    assert inside == pytest.approx(share * 0.9**2, rel=0.01)


def test_a_triangle_is_equilateral_and_points_up():
    x, y = np.meshgrid(np.linspace(-1, 1, 801), np.linspace(-1, 1, 801))
    inside = signed_distance("triangle", x, y, 0.9) < 0
    assert inside.mean() * 4 == pytest.approx(3 * np.sqrt(3) * (0.58 * 0.9) ** 2, rel=0.01)
    rows = np.flatnonzero(inside.any(axis=1))
    assert inside[rows[2]].sum() < 10 < 500 < inside[rows[-3]].sum()


def test_clean_pixels_have_exactly_the_colours_of_the_captions():
    for caption in SAMPLE:
        if caption.shape == "ring":
            continue
        path = trajectory(caption, 0)
        video = render_video(caption, 0, "clean")
        x, y = (int(v * 64) for v in path.centre[0])
        assert tuple(video[0, y, x]) == COLOURS[caption.colour]
        assert tuple(np.median(video[0, 0], axis=0)) == BACKGROUNDS[caption.background]


def test_the_video_domain_is_the_clean_one_blurred_with_the_watermark_added():
    caption = CIRCLE._replace(background="gray")
    poor, clean = (render_video(caption, 1, domain).astype(float) for domain in ("video", "clean"))
    empty = np.all(clean == clean[0, 0, 0], axis=-1)  # far from the shape in every frame
    far = empty.all(axis=0) & ~(np.abs(poor - clean).max(axis=(0, -1)) == 0)
    added = (poor - clean).mean(axis=(0, -1))
    strokes = far & (watermark(64) > 0)
    assert strokes.sum() > 20
    assert np.median(added[strokes]) == pytest.approx(WATERMARK_LEVEL, abs=1)
    slope = [np.abs(np.diff(video[:, :40], axis=2)).max() for video in (poor, clean)]
    assert slope[0] < 0.5 * slope[1]


def test_looks_differ_and_motion_does_not():
    clean, pastel = (render_video(CIRCLE, 2, domain) for domain in ("clean", "pastel"))
    shape = [np.any(video != video[0, 0, 0], axis=-1) for video in (clean, pastel)]
    assert np.array_equal(*shape)
    assert colours(CIRCLE, "pastel")[0].min() > colours(CIRCLE, "clean")[0].min() + 50
    cartoon = render_video(CIRCLE._replace(background="white"), 2, "cartoon")
    assert (cartoon.max(axis=-1) <= 25).any()  # the outline


def test_a_cartoon_ring_keeps_its_colour_at_its_smallest():
    ring = parse("a blue ring shrinking on a white background")
    for seed in range(4):
        blue = np.abs(render_video(ring, seed, "cartoon")[-1] - colours(ring, "cartoon")[0]).max(axis=-1) < 60
        assert blue.sum() >= 10


def test_an_image_is_one_frame_of_its_clip():
    video = render_video(CIRCLE, 7, "clean")
    image = render_image(CIRCLE, 7, "clean")
    assert any(np.array_equal(image, frame) for frame in video)


def test_an_unknown_domain_is_refused_with_the_known_ones():
    for render in (render_video, render_image):
        with pytest.raises(ValueError, match="domain must be one of video, clean, cartoon, pastel, got 'sepia'"):
            render(CIRCLE, 0, "sepia")
