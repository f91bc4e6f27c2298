"""A frame as it is to be shown: its orientation, its pixels' shape, its colours."""

import gc
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.frames import Orientation
from diffusers_mcm.data.video import read_clip


def corner_marked(height=48, width=48):
    """Red in the upper left, green in the upper right, blue in the lower left corner, gray elsewhere."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    half = height // 2, width // 2
    pixels[: half[0], : half[1]], pixels[: half[0], half[1] :] = (220, 20, 20), (20, 200, 20)
    pixels[half[0] :, : half[1]] = 20, 20, 220
    return pixels


def encode(
    pixels,
    codec="libx264",
    format="rgb24",
    pixel_format="yuv420p",
    prepare=None,
    bitstream=None,
    options=None,
    container="mp4",
):
    """12 times the same picture, keyframes at 0 and 6."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8, options={"g": "6", "crf": "1", "bf": "0", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], pixel_format
        if prepare:
            prepare(stream)
        filters = bitstream and BitStreamFilterContext(bitstream, stream)
        for number in range(13):
            frame = av.VideoFrame.from_ndarray(pixels, format=format) if number < 12 else None
            for packet in stream.encode(frame):
                output.mux(filters.filter(packet) if filters else packet)
    return buffer.getvalue()


def read(data, height=48, width=48, num_frames=3, uniform=0.0):
    return read_clip({"path": None, "bytes": data}, num_frames, 1, height, width, uniform).astype(int)


# a, b, c, d of FFmpeg's display matrix, and what it does to an array
ORIENTATIONS = {
    (1, 0, 0, 1): lambda a: a,
    (-1, 0, 0, 1): lambda a: a[:, ::-1],
    (1, 0, 0, -1): lambda a: a[::-1],
    (-1, 0, 0, -1): lambda a: np.rot90(a, 2),
    (0, 1, -1, 0): lambda a: np.rot90(a, -1),
    (0, -1, 1, 0): lambda a: np.rot90(a),
    (0, 1, 1, 0): lambda a: a.swapaxes(0, 1),
    (0, -1, -1, 0): lambda a: np.rot90(a, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_turned_and_mirrored_films_are_upright(matrix):
    a, b, c, d = (65536 * number for number in matrix)
    data = encode(corner_marked(), prepare=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30)))
    expected = ORIENTATIONS[matrix](read(encode(corner_marked()))[0])
    assert np.abs(read(data, uniform=0.99) - expected).mean() < 1


def test_a_turn_that_is_no_quarter_is_refused():
    data = encode(corner_marked(), prepare=lambda stream: stream.set_display_rotation(30))
    with pytest.raises(UnusableItem, match="turned by .. degrees, which is no multiple of 90"):
        read(data)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.99])
def test_an_orientation_that_the_stream_tells_at_keyframes_holds_for_all_frames(uniform):
    data = encode(corner_marked(), container="mpegts", bitstream="h264_metadata=display_orientation=insert:rotate=90")
    expected = np.rot90(read(encode(corner_marked()))[0])
    assert np.abs(read(data, uniform=uniform) - expected).mean() < 1


def test_the_first_frames_orientation_holds_where_later_keyframes_tell_none(monkeypatch):
    from diffusers_mcm.data import video

    data = encode(corner_marked(), container="mpegts", bitstream="h264_metadata=display_orientation=insert:rotate=90")
    monkeypatch.setattr(video, "orientation_of", lambda frame: None)
    assert np.abs(read(data, uniform=0.99) - np.rot90(read(encode(corner_marked()), num_frames=3)[0])).mean() < 1


def test_nothing_that_pyav_holds_is_left_to_the_garbage_collector():
    """A worker forked from a process that read a clip would free the clip's scaler, and wait for its threads."""
    data = encode(corner_marked(), prepare=lambda stream: stream.set_display_rotation(90))
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        read(data)
        gc.collect()
        assert not [thing for thing in gc.garbage if type(thing).__module__.startswith("av.")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_orientation_of_an_array():
    pixels = np.arange(24).reshape(2, 4, 3)
    assert np.array_equal(Orientation(True, True, False).apply(pixels), np.rot90(pixels, -1))


@pytest.mark.parametrize(("aspect", "turned"), [("4/3", False), ("8/9", False), ("4/3", True)])
def test_a_circle_is_round_whatever_the_shape_of_the_pixels(aspect, turned):
    aspect = Fraction(aspect)
    y, x = np.mgrid[:96, :128] - np.array([47.5, 63.5])[:, None, None]
    circle = ((x * float(aspect)) ** 2 + y**2 < 30**2)[..., None].repeat(3, -1).astype(np.uint8) * 255

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect
        if turned:
            stream.set_display_rotation(90)

    shown = read(encode(circle, prepare=prepare), 64, 64)[0, :, :, 0] > 127
    assert abs(int(shown.any(0).sum()) - int(shown.any(1).sum())) <= 1


def test_the_lines_of_one_moment_are_taken_of_an_interlaced_frame():
    pixels = np.full((96, 64, 3), 40, np.uint8)
    pixels[::2] = 200
    frame = read(encode(pixels, options={"x264-params": "interlaced=1:tff=1", "crf": "1"}), 32, 32)[0]
    assert np.abs(frame - 200).max() <= 3
