"""HDR and wide gamuts as an ordinary screen shows them."""

import numpy as np
import pytest

from diffusers_mcm.data.colour import BT709, BT2020, HLG, PQ, check_known, to_ordinary
from diffusers_mcm.data.faults import UnusableItem

from .test_frames import encode, read

# signals of light known in cd/m2, from the tables of BT.2408: black, 18 % gray, HDR reference white, 1000 cd/m2
LEVELS = {PQ: (0.0, 0.38, 0.58, 0.7518), HLG: (0.0, 0.38, 0.75, 1.0)}


@pytest.mark.parametrize("transfer", LEVELS)
def test_gray_keeps_its_place_below_white(transfer):
    black, gray, white, peak = (int(to_ordinary(np.full(3, level), transfer, BT2020)[0]) for level in LEVELS[transfer])
    assert black == 0 and peak == 255
    assert abs(gray - 255 * (26 / 203) ** (1 / 2.4)) <= 4  # 26 cd/m2 of 203, under a gamma of 2.4
    assert 220 <= white < peak


def test_light_is_compressed_evenly():
    levels = to_ordinary(np.linspace(0, 1, 400)[:, None].repeat(3, 1), PQ, BT2020)[:, 0].astype(int)
    assert (np.diff(levels) >= 0).all() and np.diff(levels).max() <= 4


def test_wide_colours_keep_their_hue_and_gray_stays():
    """The green of BT.709, written in BT.2020: its column of the matrix of BT.2087."""
    green = np.array([0.3293, 0.9195, 0.0880]) ** (1 / 2.4)
    assert np.abs(to_ordinary(green, BT709, BT2020).astype(int) - [0, 255, 0]).max() <= 12
    assert to_ordinary(np.full(3, 128 / 255), BT709, BT2020).tolist() == [128] * 3


def test_an_hdr_film_is_not_washed_out():
    patches = np.repeat(np.array([0.0, 0.38, 0.58, 0.7518]), 32)[None, :, None].repeat(32, 0).repeat(3, 2)
    pixels = np.round(patches * 65535).astype(np.uint16)

    def prepare(stream):
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = PQ, BT2020, BT2020, 1

    data = encode(pixels, "libx265", "rgb48le", "yuv420p10le", prepare, options={"x265-params": "log-level=none:qp=4"})
    shown = read(data, 32, 128)[0, 16, 16::32]
    assert np.abs(shown - to_ordinary(patches[16, 16::32], PQ, BT2020)).max() <= 4


@pytest.mark.parametrize("primaries", [4, 8, 11, 12, BT2020])
def test_white_stays_white_and_gray_gray_whatever_the_primaries(primaries):
    for level in (255, 128, 40):
        assert to_ordinary(np.full(3, level / 255), BT709, primaries).tolist() == [level] * 3
    assert to_ordinary(np.array([0.6, 0.3, 0.3]), BT709, primaries)[0] > 160  # more red than BT.709's own 153


def test_the_colours_of_1953_are_those_of_their_standard():
    """NTSC's green lies outside BT.709; its red (0.67, 0.33) is brighter than BT.709's, by the matrix of the eye."""
    from diffusers_mcm.data.colour import _BT709_PRIMARIES, _OTHER_PRIMARIES, _rgb_to_xyz

    matrix = np.linalg.solve(_rgb_to_xyz(_BT709_PRIMARIES), _rgb_to_xyz(_OTHER_PRIMARIES[4]))
    # the rows that colour libraries give for NTSC (1953) to sRGB with Bradford's adaptation
    expected = [[1.4858, -0.4033, -0.0825], [-0.0251, 0.9541, 0.0710], [-0.0272, -0.0440, 1.0712]]
    assert np.abs(matrix - expected).max() < 2e-3
    assert np.allclose(matrix.sum(axis=1), 1)


@pytest.mark.parametrize("primaries", [10, 13, 21, 99])
def test_primaries_that_nobody_converts_are_refused(primaries):
    with pytest.raises(UnusableItem, match=f"primary colours .number {primaries} of H.273. cannot be converted"):
        check_known(BT709, BT709, primaries)
    for known in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 22):
        check_known(BT709, BT709, known)


@pytest.mark.parametrize("primaries", [4, 10])
def test_the_primaries_of_a_film_are_those_it_tells(primaries):
    pixels = np.full((32, 32, 3), (150, 80, 80), np.uint8)

    def show(told):
        def prepare(stream):
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = BT709, told, BT709

        return read(encode(pixels, prepare=prepare), 32, 32)[0, 16, 16]

    if primaries == 10:
        with pytest.raises(UnusableItem, match="primary colours .number 10"):
            show(10)
        return
    shown, plain = show(4), show(BT709)
    assert np.abs(shown - to_ordinary(plain / 255, BT709, 4)).max() <= 3
    assert np.abs(shown - plain).max() > 6


@pytest.mark.parametrize(
    ("transfer", "matrix", "reason"),
    [(8, 1, "transfer characteristic .number 8"), (16, 14, "colour matrix .number 14")],
)
def test_colours_that_nobody_converts_are_refused(transfer, matrix, reason):
    with pytest.raises(UnusableItem, match=reason):
        check_known(transfer, matrix)
