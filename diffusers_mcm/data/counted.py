"""Films whose frames had to be counted, which means decoding all of them: what came out is remembered."""

import hashlib
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .film import FilmIndex
from .images import open_path
from .timing import ClipChoice, Time, times_in_output_order

#: So many frames' times are kept by a process, some 70 bytes each.
MAX_FRAMES = 500_000
_PIECES, _PIECE = 64, 1024  # of a film's bytes


@dataclass(frozen=True)
class CountedFilm(FilmIndex):
    """The index of a film that was decoded from its first frame to its last; its `times` are those of `labels`.

    Attributes:
        labels: the time that each frame carries, in the order in which the frames are shown; None where it has none.
        places: where a label stands among them, if the labels are those of the packets and only in another order (AVI
            numbers frames as they are decoded); else empty, and decoding has to start with the first frame.
    """

    labels: list[int | None]
    places: dict[int, int]

    @classmethod
    def of(cls, index: FilmIndex, labels: list[int | None]) -> "CountedFilm":
        known = [label for label in labels if label is not None]
        in_another_order = index.sound and len(known) == len(labels) and sorted(known) == index.times
        places = {label: place for place, label in enumerate(known)} if in_another_order else {}
        keyframes = sorted(index.keyframes, key=lambda keyframe: places[keyframe.pts]) if places else []
        changed = {"times": (), "keyframes": keyframes, "end": index.end if places else None}
        return cls(**vars(index) | changed, labels=labels, places=places)

    def expected(self) -> Sequence[Time | None]:
        return self.labels

    def positions(self, choice: ClipChoice) -> list[int]:
        times = times_in_output_order(self.labels, self.time_base, self.rate)  # keeping them would take more room
        return choice.positions(times, self.time_base, self.end)

    def starts(self, position: int) -> Iterator[tuple[int, int]]:
        """Where to seek for the frame at `position`, and the number of the keyframe where decoding then begins."""
        before = bisect_left(self.keyframes, position + 1, key=lambda keyframe: self.places[keyframe.pts])
        for keyframe in self.keyframes[max(before - 1, 0) : before]:
            for target in keyframe.targets():
                yield target, self.places[keyframe.pts]

    def place(self, label: int, since: int) -> int | None:
        """The number of the frame with time `label` if that is `since`, the number that `starts` gave; else None."""
        return since if self.places.get(label) == since else None


class CountedFilms:
    """The films that this process counted, the last ones that `MAX_FRAMES` have room for."""

    def __init__(self) -> None:
        self._films: OrderedDict[tuple, CountedFilm] = OrderedDict()
        self._num_frames = 0

    def get(self, key: tuple | None) -> CountedFilm | None:
        if key is None or key not in self._films:
            return None
        self._films.move_to_end(key)
        return self._films[key]

    def add(self, key: tuple | None, film: CountedFilm) -> None:
        self.drop(key)
        if key is None or len(film.labels) > MAX_FRAMES:
            return
        self._films[key] = film
        self._num_frames += len(film.labels)
        while self._num_frames > MAX_FRAMES:
            self.drop(next(iter(self._films)))

    def drop(self, key: tuple | None) -> None:
        film = None if key is None else self._films.pop(key, None)
        self._num_frames -= len(film.labels) if film else 0

    def __len__(self) -> int:
        return len(self._films)


def film_key(media: dict) -> tuple | None:
    """A key that tells a film from others, and from what it was before it was written anew; None if nothing does."""
    path, data = open_path(media), (media or {}).get("bytes")
    if data is not None:  # a few of them tell films apart, and cost nothing beside decoding
        digest = hashlib.blake2b(digest_size=16)
        for piece in range(_PIECES):
            start = piece * len(data) // _PIECES
            digest.update(data[start : start + _PIECE])
        return (digest.digest(), len(data))
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None  # an address
    return (path, status.st_size, status.st_mtime_ns)
