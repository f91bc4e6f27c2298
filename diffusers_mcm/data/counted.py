"""Films whose frames had to be counted, which means decoding all of them: what came out is remembered."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .film import FilmIndex
from .images import open_path
from .timing import ClipChoice, Time, times_in_output_order

#: So many frames' times are kept by a process, some 70 bytes each.
MAX_FRAMES = 500_000


@dataclass(frozen=True)
class CountedFilm(FilmIndex):
    """The index of a film that was decoded from its first frame to its last; its `times` are those of `labels`."""

    labels: list[int | None]  # the time that each frame carries, in the order in which they are shown, if it has one
    # Where a label stands among them, if the labels are those of the packets and only in another order (AVI numbers
    # frames as they are decoded); else empty, and decoding has to start with the first frame.
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


def remember(films: dict[tuple | None, CountedFilm], key: tuple | None, film: CountedFilm) -> None:
    """Put a film last, and let the first ones go where there is no room; without a key it is not kept."""
    if key is None or len(film.labels) > MAX_FRAMES:
        return
    films[key] = film
    while sum(len(each.labels) for each in films.values()) > MAX_FRAMES:
        del films[next(iter(films))]


def film_key(media: dict) -> tuple | None:
    """A key that tells a film from others, and from what it was before it was written anew; None if nothing does."""
    path, data = open_path(media), (media or {}).get("bytes")
    if data is not None:
        return hash(data), len(data)
    try:
        status = os.stat(path or "")
    except OSError:
        return None  # no file, or an address
    return path, status.st_size, status.st_mtime_ns
