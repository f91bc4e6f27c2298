"""Films whose frames had to be counted, which means decoding all of them: what came out is remembered."""

import os
from collections.abc import Sequence
from dataclasses import replace

from .film import FilmIndex
from .images import open_path
from .timing import times_in_output_order

#: So many frames are kept by a process, some 150 bytes each.
MAX_FRAMES = 500_000


def counted_film(index: FilmIndex, labels: Sequence[int | None]) -> FilmIndex:
    """The index of a film that was decoded from its first frame to its last, which carried these times.

    Its keyframes help only if these are the times of the packets and only in another order (AVI numbers frames as they
    are decoded); else decoding has to start with the first frame.
    """
    times = times_in_output_order(labels, index.time_base, index.rate)
    if None in labels or sorted(label for label in labels if label is not None) != index.labels:
        return replace(index, times=times, labels=labels, keyframes=[], end=None)
    places = {label: place for place, label in enumerate(labels)}
    keyframes = sorted(index.keyframes, key=lambda keyframe: places[keyframe.pts])
    return replace(index, times=times, labels=labels, keyframes=keyframes)


def remember(films: dict[tuple | None, FilmIndex], key: tuple | None, film: FilmIndex) -> None:
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
        return hash(bytes(data)), len(data)
    try:
        status = os.stat(path or "")
    except OSError:
        return None  # no file, or an address
    return path, status.st_size, status.st_mtime_ns
