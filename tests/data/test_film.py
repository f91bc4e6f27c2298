"""Which stream is the film, and what its packets say."""

import io

import av
import pytest
from av.stream import Disposition

from diffusers_mcm.data import video
from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.data.film import open_film, read_index
from diffusers_mcm.data.timing import ClipChoice
from diffusers_mcm.data.video import read_clip

from .conftest import encode_mp4, flat_frames, read_numbers


def index_of(data):
    with open_film({"path": None, "bytes": data}) as container:
        return read_index(container)


def test_the_packets_give_the_times_and_where_decoding_can_start(clip):
    """24 frames at 8 per second, with keyframes at 0, 8 and 16."""
    index = index_of(clip)
    assert index.labels == index.times
    assert [time * index.time_base * 8 for time in index.times] == list(range(24))
    assert [index.times.index(keyframe.pts) for keyframe in index.keyframes] == [0, 8, 16]
    assert index.end * index.time_base == 3 and index.rate == 8
    assert index.positions(ClipChoice(3, 2, None, 0.0)) == [0, 2, 4]


def test_a_frame_is_sought_from_the_keyframe_before_it(clip):
    index = index_of(clip)
    for position, expected in ((0, [0]), (7, [0]), (8, [8]), (23, [16, 0])):
        assert list(dict.fromkeys(since for _, since in index.starts(position))) == expected
        assert next(index.starts(position))[0] == index.times[expected[0]]
    assert [index.places[label] for label in index.times] == list(range(24))


def test_without_times_the_frames_follow_one_another_at_the_rate():
    index = index_of(encode_mp4(flat_frames(12), container="h264", rate=8))
    assert not index.labels and not index.keyframes and index.end is None
    steps = {later - earlier for earlier, later in zip(index.times, index.times[1:])}
    assert len(index.times) == 12 and steps == {1 / (index.rate * index.time_base)}


def test_a_cover_picture_is_not_the_film():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        cover, film = output.add_stream("mjpeg", rate=1), output.add_stream("libx264", rate=8)
        cover.disposition = Disposition.attached_pic.value
        for stream, pixel_format in ((cover, "yuvj420p"), (film, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 32, 24, pixel_format
        output.mux(cover.encode(av.VideoFrame.from_ndarray(flat_frames(40)[-1], format="rgb24")))
        for frame in flat_frames(12):
            output.mux(film.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(film.encode())
    index = index_of(buffer.getvalue())
    assert (index.stream, len(index.times)) == (1, 12)
    assert read_numbers(buffer.getvalue(), 4, 1, 0.0) == [0, 1, 2, 3]


def test_a_stream_that_pyav_does_not_know_makes_the_file_unusable(clip, monkeypatch):
    class Demuxing:
        def __init__(self, container):
            self.streams, self.seek = container.streams, container.seek

        def demux(self, streams):
            raise IndexError("list index out of range")
            yield

    original = video.read_index
    monkeypatch.setattr(video, "read_index", lambda container: original(Demuxing(container)))
    with pytest.raises(UnusableItem, match="a stream begins in the middle of the file"):
        read_numbers(clip, 2, 2, 0.0)


def test_unknown_codec_is_unusable(clip):
    header = clip.index(b"avc1", clip.index(b"stsd"))
    with pytest.raises(UnusableItem, match="codec is unknown"):
        read_clip({"path": None, "bytes": clip[:header] + b"zzzz" + clip[header + 4 :]}, 2, 1, 8, 8, 0.0)
