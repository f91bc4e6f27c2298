"""One decoded frame as a picture: upright, with square pixels and the colours of an ordinary screen."""

from typing import NamedTuple, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import VideoReformatter
from PIL import Image

from .colour import BT2020, HLG, PQ, UNSPECIFIED, check_known, is_ordinary, to_ordinary
from .faults import UnusableItem
from .images import fit

_TANGENT_OF_ONE_DEGREE = 0.0175
# The workers of the loader are the parallelism; PyAV 17 began to convert colours in threads.
_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}


class Orientation(NamedTuple):
    """How stored pixels (H, W, 3) become upright: rows and columns change places, then the axes are reversed."""

    transposed: bool = False
    reverse_x: bool = False
    reverse_y: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.reverse_y else 1, :: -1 if self.reverse_x else 1]


def orientation_of(frame: av.VideoFrame) -> Orientation | None:
    """The orientation that a frame asks for, None if nothing; `UnusableItem` for a turn that is not by quarters."""
    try:
        # not `frame.side_data`: a frame that keeps it is in a cycle, and so left to the garbage collector with its
        # scaler, for whose threads a forked worker would then wait for ever
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # PyAV's stub has no constructor
    except ValueError:  # PyAV refuses the whole list where one kind of side data is unknown to it
        turned = (None, Orientation(True, False, True), Orientation(False, True, True), Orientation(True, True))
        return turned[round(frame.rotation / 90) % 4]
    if matrix is None:
        return None
    # x' = a·x + c·y and y' = b·x + d·y, in FFmpeg's layout a b u, c d v, x y w
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    straight, across = sorted((abs(a), abs(d))), sorted((abs(b), abs(c)))
    if across[1] <= _TANGENT_OF_ONE_DEGREE * straight[0]:
        return Orientation(False, a < 0, d < 0)
    if straight[1] <= _TANGENT_OF_ONE_DEGREE * across[0]:
        return Orientation(True, c < 0, b < 0)
    raise UnusableItem(f"it is to be shown turned by {frame.rotation} degrees, which is no multiple of 90")


def _upper_field(frame: av.VideoFrame) -> av.VideoFrame:
    """Every other line of an interlaced frame: the lines between belong to another moment."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("field", "type=top"), graph.add("buffersink")).configure()
    graph.push(frame)
    return cast(av.VideoFrame, graph.pull())


def picture(
    frame: av.VideoFrame,
    stream: av.VideoStream,
    orientation: Orientation,
    height: int,
    width: int,
    reformatter: VideoReformatter,
) -> np.ndarray:
    """The last frame of the decoder of `stream` as players show it, scaled and cropped: uint8 (height, width, 3).

    The `reformatter`, which converts the colours, is one for all frames of a clip: to set one up takes time. Of an
    interlaced frame the upper field is taken. HDR and wide gamuts are converted, see `colour.to_ordinary`.
    `UnusableItem` for a corrupt frame, and for colours that cannot be converted.
    """
    if frame.is_corrupt:
        raise UnusableItem(f"its frame{'' if frame.time is None else f' at {frame.time:.2f} s'} is corrupt")
    transfer, primaries = stream.codec_context.color_trc, stream.codec_context.color_primaries  # numbers of H.273
    aspect = float(stream.sample_aspect_ratio or 1)  # width of a stored pixel in heights
    check_known(transfer, frame.colorspace, primaries)
    if frame.interlaced_frame and frame.height > 1:
        frame, aspect = _upper_field(frame), aspect / 2
    aspect = 1 / aspect if orientation.transposed else aspect
    if is_ordinary(transfer, primaries):
        pixels = orientation.apply(reformatter.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray())
        return np.asarray(fit(Image.fromarray(pixels), height, width, aspect))
    untold = transfer in (PQ, HLG) and frame.colorspace == UNSPECIFIED
    colours = BT2020 if untold else None
    frame = reformatter.reformat(frame, format="rgb48le", src_colorspace=colours, **_ONE_THREAD)
    signal = orientation.apply(frame.to_ndarray()).astype(np.float32) / 65535
    planes = [fit(Image.fromarray(np.ascontiguousarray(signal[..., i])), height, width, aspect) for i in range(3)]
    return to_ordinary(np.stack([np.asarray(plane) for plane in planes], axis=-1), transfer, primaries)
