import numpy as np
import pytest

from diffusers_mcm.shapes.build import compress
from diffusers_mcm.shapes.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, all_captions, parse
from diffusers_mcm.shapes.oracle import WATERMARK_SEEN, all_right, appearance_right, read_image, read_video
from diffusers_mcm.shapes.render import WATERMARK_LEVEL, render_image, render_video, trajectory, watermark

# every word of the grammar comes up; seeds follow the position
SAMPLE = list(enumerate(all_captions()[4::41]))
FEW = SAMPLE[::3]
BALL = parse("a red circle moving left on a gray background")


def clip(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def following(words, word):
    words = list(words)
    return words[(words.index(word) + 1) % len(words)]


def render(caption, seed, domain):
    return compress(render_video(caption, seed)) if domain == "compressed" else render_video(caption, seed, domain)


def empty(caption):
    return np.full((16, 64, 64, 3), BACKGROUNDS[caption.background], dtype=np.uint8)


@pytest.mark.parametrize("domain", ["video", "compressed", "clean", "cartoon", "pastel"])
def test_rendered_truth_is_read_right_in_every_domain(domain):
    for seed, caption in SAMPLE:
        reading = read_video(render(caption, seed, domain))
        assert all_right(reading, caption), (str(caption), reading[:4])
        assert all_right(reading, str(caption))
        assert reading.watermark_seen == (domain in ("video", "compressed"))


@pytest.mark.parametrize("domain", ["clean", "compressed"])
def test_positions_radii_and_displacement_are_the_true_ones(domain):
    for seed, caption in FEW:
        truth = trajectory(caption, seed)
        reading = read_video(render(caption, seed, domain))
        assert np.abs(reading.positions - truth.centre).max() < 0.03
        assert np.abs(reading.radii / truth.radius - 1).max() < 0.15
        still = caption.motion in ("growing", "shrinking")
        ends = truth.radius[[0, -1]][:, None] if still else truth.centre[[0, -1]]
        assert reading.displacement == pytest.approx(np.linalg.norm(ends[1] - ends[0]) / 15, rel=0.12)


def test_images_are_read_as_far_as_one_frame_goes():
    for domain in ("clean", "cartoon", "pastel"):
        for seed, caption in SAMPLE[::2]:
            reading = read_image(render_image(caption, seed, domain))
            assert appearance_right(reading, caption), (domain, str(caption), reading[:4])
            assert reading.motion is None and reading.flicker == 0 and not all_right(reading, caption)


def test_smaller_and_shorter_clips_are_read_too():
    for seed, caption in FEW:
        assert all_right(read_video(render_video(caption, seed, "video", size=32, num_frames=8)), caption)


IMPERFECT = {
    "noise": lambda v, rng: v + rng.normal(0, 10, v.shape),
    "tint": lambda v, rng: 0.92 * v + rng.uniform(0, 20, 3),
    "unsteady light": lambda v, rng: v + rng.normal(0, 8, (len(v), 1, 1, 1)),
    "shaking": lambda v, rng: np.stack([np.roll(f, rng.integers(-1, 2, 2), (0, 1)) for f in v]),
    "torn": lambda v, rng: np.stack([(np.roll(f, k % 2, 0) + np.roll(f, k % 3, 1)) / 2 for k, f in enumerate(v)]),
}


@pytest.mark.parametrize("flaw", IMPERFECT)
def test_an_imperfect_clip_is_still_read_right(flaw):
    rng = np.random.default_rng(0)
    for seed, caption in FEW:
        video = render_video(caption, seed).astype(float)
        assert all_right(read_video(clip(IMPERFECT[flaw](video, rng))), caption), str(caption)


def other(word_list, field):
    return lambda caption, seed: render_video(
        caption._replace(**{field: following(word_list, getattr(caption, field))}), seed
    )


def halves(second, at=8):
    return lambda caption, seed: np.concatenate([render_video(caption, seed)[:at], second(caption, seed)[at:]])


WRONG = {
    "another colour": other(COLOURS, "colour"),
    "another shape": other(SHAPES, "shape"),
    "another motion": other(MOTIONS, "motion"),
    "another background": other(BACKGROUNDS, "background"),
    "no shape": lambda caption, seed: empty(caption),
    "noise only": lambda caption, seed: np.random.default_rng(seed).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8),
    "a static shape": lambda caption, seed: np.repeat(render_video(caption, seed)[8:9], 16, axis=0),
    "reversed": lambda caption, seed: render_video(caption, seed)[::-1],
    "there and back": lambda caption, seed: render_video(caption, seed)[[*range(0, 16, 2), *range(15, 0, -2)]],
    "frames in no order": lambda caption, seed: np.random.default_rng(seed).permutation(render_video(caption, seed)),
    "vanishes half-way": halves(lambda caption, seed: empty(caption)),
    "vanishes at the end": halves(lambda caption, seed: empty(caption), at=13),
    "changes its colour": halves(other(COLOURS, "colour")),
    "changes its colour late": halves(other(COLOURS, "colour"), at=13),
    "changes its shape": halves(other(SHAPES, "shape")),
    "changes the background": halves(other(BACKGROUNDS, "background")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_never_all_right(wrong):
    for seed, caption in FEW:
        assert not all_right(read_video(WRONG[wrong](caption, seed)), caption), str(caption)


def painted(caption, *balls):
    """A clip of shapes that move left together, each (colour, shape's mask of x and y, x, y)."""
    y, x = (np.mgrid[:64, :64] + 0.5) / 64
    video = empty(caption).copy()
    for colour, centre_x, centre_y, radius in balls:
        for t in range(16):
            video[t][np.hypot(x - centre_x + 0.02 * t, y - centre_y) < radius] = COLOURS[colour]
    return video


def test_two_shapes_are_not_one():
    one = ("red", 0.6, 0.3, 0.15)
    assert all_right(read_video(painted(BALL, one)), BALL)
    for second in [("red", 0.75, 0.75, 0.15), ("blue", 0.75, 0.75, 0.15), ("red", 0.75, 0.75, 0.09)]:
        assert not all_right(read_video(painted(BALL, one, second)), BALL), second


def test_a_shape_of_two_colours_has_none():
    video = painted(BALL, ("red", 0.6, 0.4, 0.2), ("green", 0.6, 0.4, 0.14))
    reading = read_video(video)
    assert reading.colour is None and reading.shape == "circle"


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_watermark_is_measured_in_shares_of_a_full_one(background):
    caption = BALL._replace(background=background)
    clean = render_video(caption, 3, "clean").astype(float)
    for share in (0, 0.15, 0.5, 1):
        reading = read_video(clip(clean + share * WATERMARK_LEVEL * watermark(64)[None, :, :, None]))
        assert reading.watermark == pytest.approx(share, abs=0.12)
        assert reading.watermark_seen == (share > WATERMARK_SEEN)
        assert all_right(reading, caption)


def test_sharpness_tells_sharp_from_blurred_whatever_is_shown():
    sharp, poor = [], []
    for seed, caption in SAMPLE[::2]:
        sharp += [read_video(render_video(caption, seed, domain)).sharpness for domain in ("clean", "pastel")]
        poor.append(read_video(render_video(caption, seed)).sharpness)
    assert min(sharp) > 1.15 * max(poor)
    assert np.std(sharp) < 0.05 * np.mean(sharp)


def test_flicker_grows_with_what_motion_does_not_explain():
    rng = np.random.default_rng(0)
    video = render_video(BALL, 1, "clean").astype(float)
    flash = rng.normal(0, 6, (16, 1, 1, 1))
    levels = [read_video(clip(video + amount * flash)).flicker for amount in (0, 1, 2)]
    assert levels[0] < 0.005 < levels[1] < levels[2]
    still = read_video(np.repeat(clip(video)[:1], 16, axis=0))
    assert still.flicker == 0 and still.displacement == pytest.approx(0, abs=1e-6)


def test_nothing_there_is_read_as_nothing():
    reading = read_video(empty(BALL))
    assert reading[:4] == (None, None, None, "gray")
    assert np.isnan(reading.positions).all() and np.isnan(reading.sharpness) and reading.displacement == 0
    assert not reading.watermark_seen


def test_wrong_arrays_are_refused():
    for frames in (np.zeros((16, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), np.zeros((16, 64, 48, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected square uint8 frames \(T, H, W, 3\), got"):
            read_video(frames)
