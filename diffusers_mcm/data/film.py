"""The stream of a file that is the film, and the index of its frames that its packets give."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, cast

import av
from av.error import FFmpegError
from av.stream import Disposition

from .faults import UnusableItem, check_own_fault
from .frames import Orientation, orientation_of
from .images import media_file
from .timing import ClipChoice, Time, at_constant_rate

# Streams of these codecs may tell their orientation themselves, and once for all.
_TELL_ORIENTATION = {"h264", "hevc", "vvc"}
# Colours of Dolby Vision's profile 5 mean nothing without what only its own decoders apply.
_DOLBY_VISION_TAGS = {"dvh1", "dvhe", "dav1", "dva1", "dvav"}


class Keyframe(NamedTuple):
    """Where decoding can start, in the stream's time base."""

    pts: int
    dts: int | None


@dataclass(frozen=True)
class FilmIndex:
    """The index of a film's frames: from its packets, without decoding (but for the first frame), or counted."""

    stream: int  # number of the film's stream in its container
    times: Sequence[Time]  # ascending presentation time of every frame, in the stream's time base
    labels: Sequence[int | None]  # those that the decoder is to give, in the order of presentation; () if nobody knows
    keyframes: list[Keyframe]  # the frames where decoding can start, as they are shown; none if the labels do not help
    time_base: Fraction  # seconds of one unit of time
    rate: Fraction | None  # frames per second as far as it is known
    orientation: Orientation  # what the first frame says
    end: int | None  # when the last frame is no longer shown, as far as that is known

    @cached_property
    def places(self) -> dict[int | None, int]:
        """The number of the frame with each label."""
        return {label: place for place, label in enumerate(self.labels)}

    def positions(self, choice: ClipChoice) -> list[int]:
        """The numbers of the clip's frames."""
        return choice.positions(self.times, self.time_base, self.end)

    def starts(self, position: int) -> Iterator[tuple[int, int]]:
        """Where to seek for the frame at `position`, and the number of the keyframe where decoding then begins.

        Containers with an index go by presentation times, others search by decoding times. Such a search may land
        late, so that an earlier keyframe is worth another try.
        """
        before = [keyframe for keyframe in self.keyframes if self.places[keyframe.pts] <= position]
        for keyframe in before[-1:] + before[-3:-2]:
            for target in dict.fromkeys(keyframe):
                if target is not None:
                    yield target, self.places[keyframe.pts]


@contextmanager
def open_film(media: dict) -> Iterator[av.container.InputContainer]:
    with av.open(media_file(media), metadata_errors="ignore") as container:
        for stream in container.streams.video:
            if stream.codec_context is not None:
                stream.codec_context.thread_count = 1  # the workers of the loader are the parallelism
        yield container


def read_packets(container: av.container.InputContainer, streams) -> Iterator[av.Packet]:
    """The packets of one or several streams, in the order of the file, with an empty one for each at the end."""
    try:
        yield from container.demux(streams)
    except IndexError as error:  # PyAV lost count of the streams
        raise UnusableItem("a stream begins in the middle of the file, which is probably damaged") from error


def film_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The streams that may be the film, the likeliest first: by default flag, then by size. Covers are none."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    films = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not films:
        raise UnusableItem(f"it has no video stream{', only a cover picture' if container.streams.video else ''}")
    films = [stream for stream in films if stream.codec_context is not None]
    if not films:
        raise UnusableItem("its codec is unknown, or its header is damaged")
    films.sort(key=lambda stream: (not stream.disposition & Disposition.default, -stream.width * stream.height))
    if films[0].codec_context.codec_tag in _DOLBY_VISION_TAGS:
        raise UnusableItem("its colours are Dolby Vision's own, which cannot be converted")
    return films


def _first_orientation(packet: av.Packet) -> Orientation | None:
    """The orientation that the frame of a keyframe's packet asks for; the decoder is left as it was."""
    decoder = packet.stream.codec_context
    try:
        frames = [*packet.decode(), *decoder.decode(None)]
    except FFmpegError as error:
        check_own_fault(error, None)
        return None  # a broken first frame does no harm to a clip that lies elsewhere
    finally:
        decoder.flush_buffers()
    return orientation_of(frames[0]) if frames else None


def read_index(container: av.container.InputContainer, oriented: bool = True) -> FilmIndex:
    """Find the film and read its packets. A stream of a single picture is the film only if there is no other.

    Only if it is to be `oriented` is anything decoded, its first frame.
    """
    streams = film_streams(container)
    durations: dict[int, list[tuple[int | None, int | None]]] = {stream.index: [] for stream in streams}  # by times
    keyframes: dict[int, list[Keyframe]] = {stream.index: [] for stream in streams}
    orientations: dict[int, Orientation | None] = {}
    for packet in read_packets(container, streams):
        if not packet.size or packet.is_discard or packet.is_corrupt:
            continue
        number = packet.stream.index
        durations[number].append((packet.pts, packet.duration))
        if packet.is_keyframe and packet.pts is not None:
            keyframes[number].append(Keyframe(packet.pts, packet.dts))
        if packet.is_keyframe and number not in orientations:
            tells = oriented and packet.stream.codec_context.name in _TELL_ORIENTATION
            orientations[number] = _first_orientation(packet) if tells else None
    film = next((stream for stream in streams if len(durations[stream.index]) > 1), streams[0])
    shown = {time: duration for time, duration in durations[film.index] if time is not None}
    times, rate = sorted(shown), film.guessed_rate or film.average_rate
    sound = len(times) == len(durations[film.index])
    last = shown[times[-1]] if sound and times else None
    time_base = cast(Fraction, film.time_base)  # which a stream of a container has
    return FilmIndex(
        stream=film.index,
        times=times if sound else at_constant_rate(len(durations[film.index]), time_base, rate),
        labels=times if sound else (),
        keyframes=sorted(keyframes[film.index]) if sound else [],
        time_base=time_base,
        rate=rate,
        orientation=orientations.get(film.index) or Orientation(),
        end=times[-1] + last if last else None,
    )
