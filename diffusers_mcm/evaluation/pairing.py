"""Which videos of several methods are compared with each other, and the differences between them."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .distances import resampled
from .measuring import Measured
from .metrics import Score, difference, draws_of
from .results import Difference
from .videos import VideoSet, by_numbers

logger = logging.getLogger(__name__)
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


def check_alike(samples: Sequence[VideoSet]) -> None:
    """`ValueError` unless there are samples, and all folders show the same captions, but for what cannot be opened."""
    if not samples:
        raise ValueError("expected at least one folder of samples, got none")
    first = samples[0]
    for other in samples[1:]:
        counts = [len(each.videos) + len(each.skipped) for each in (first, other)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"expected as many videos in every folder, got {counts[0]} in {first.source} and {counts[1]} in "
                f"{other.source}: a Fréchet distance grows as the number falls"
            )
        for a, b in ((first, other), (other, first)):
            missing = a.captions() - b.captions()
            if missing.total() > len(b.skipped):
                raise ValueError(
                    f"expected the same captions in every folder, but {b.source} does not show "
                    f"{next(iter(missing))!r}, as {a.source} does: make both from one list of prompts"
                )


def warn_of_other_captions(samples: VideoSet, real: VideoSet) -> None:
    """Say so if the samples show what the reference does not."""
    others = samples.captions().keys() - real.captions().keys()
    if others or len(samples.videos) != len(real.videos):
        logger.warning(
            "%s holds %d videos, of which %d captions are not the reference's, and the reference %d videos: with "
            "--write_prompts, --num_videos and --seed both are made of the same rows.",
            *(samples.source, len(samples.videos), len(others), len(real.videos)),
        )


def common(results: Mapping[str, Measured]) -> tuple[dict[str, Measured], int]:
    """All methods' results on the videos that every one of them has, in one order; and how many are left out for that.

    A video is compared with that of the same caption and seed. Where a method's seeds are not known, or are others,
    the k-th video of a caption, by its seed and then the numbers in its name, is compared with the k-th of another.
    """
    places = _places(results, by_seed=True)
    if len(_shared(places)) < _most_left(results) or any(v.seed is None for m in results.values() for v in m.videos):
        places = _places(results, by_seed=False)
    shared = _shared(places)
    everything = set.union(*(set(place) for place in places.values()))
    alike = {name: results[name].only([place[key] for key in shared]) for name, place in places.items()}
    return alike, len(everything) - len(shared)


_Places = dict[str, dict[tuple[str, int, int], int]]


def _places(results: Mapping[str, Measured], by_seed: bool) -> _Places:
    """Method -> (caption, seed or 0, how many of these came before) -> the video's number."""
    found: _Places = {}
    for name, measured in results.items():
        videos, seen = measured.videos, Counter[tuple[str, int]]()
        own = found.setdefault(name, {})
        keys = [(video.caption, video.seed or 0, by_numbers(video.name)) for video in videos]
        for number in sorted(range(len(videos)), key=keys.__getitem__):
            of = videos[number].caption, (videos[number].seed or 0) if by_seed else 0
            own[*of, seen[of]] = number
            seen[of] += 1
    return found


def _shared(places: _Places) -> list[tuple[str, int, int]]:
    return sorted(set.intersection(*(set(place) for place in places.values())))


def _most_left(results: Mapping[str, Measured]) -> int:
    """How many videos all methods have at least, if they were made of the same captions and seeds."""
    skipped = [len(measured.skipped) for measured in results.values()]
    return max(len(measured.videos) + len(measured.skipped) for measured in results.values()) - sum(skipped)


def differences_of(
    results: Mapping[str, Measured],
    scores: Mapping[str, Mapping[str, Score]],
    values: Mapping[str, Mapping[str, float]],
    resamples: int,
    seed: int,
    progress: Progress = lambda items, name: items,
) -> list[Difference]:
    """Between all pairs of methods on the same videos, each with its paired interval over captions.

    `values` are the scores on all videos.
    """
    measured = next(iter(results.values()))
    groups: dict[str, list[int]] = {}
    for number, video in enumerate(measured.videos):
        groups.setdefault(video.caption, []).append(number)
    if len(results) < 2 or resamples < 2 or len(groups) < 2:
        return []
    numbers = [np.array(group) for group in groups.values()]
    drawn = resampled(len(groups), resamples, seed)
    wanted = [(name, key) for name in results for key in scores[name]]
    draws = {(n, key): draws_of(scores[n][key], numbers, drawn) for n, key in progress(wanted, "intervals")}
    return [
        Difference(b, a, key, difference(values[b][key], values[a][key], draws[b, key], draws[a, key]), resamples)
        for a, b in itertools.combinations(results, 2)
        for key in scores[a]
    ]
