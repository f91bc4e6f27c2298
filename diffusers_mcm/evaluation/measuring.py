"""Features of sets of videos, computed a shard at a time and kept: a stopped run goes on, and processes share them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.faults import UnusableItem
from ..files import atomic_file, write_text
from ..hub import public_name
from .distances import unit
from .motion import motion_of
from .networks import ClipFeatures, Features
from .videos import Video, VideoSet, Window

SHARD = 16  # videos whose frames are in memory at one time
FORMAT = 2  # of the files of features
INDEX_NAME = "index.json"  # of the features of one set, as they were measured last


class Measure(NamedTuple):
    """What is computed of each video.

    Attributes:
        compute: (frames uint8 (N, T, H, W, 3), captions) -> values (N, ...).
        key: what decides the values, as plain data.
    """

    compute: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    key: Any


def _in_batches(network: Callable[[np.ndarray], np.ndarray], items: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([network(items[start : start + size]) for start in range(0, len(items), size)])


def video_measure(network: Features, batch_size: int) -> Measure:
    """Features (N, d) of whole videos."""
    return Measure(lambda frames, captions: _in_batches(network, frames, batch_size), network.described())


def _of_frames(network: Features, frames: np.ndarray, batch_size: int) -> np.ndarray:
    """Features (N, T, d) of each frame."""
    found = _in_batches(network, frames.reshape(-1, *frames.shape[2:]), 8 * batch_size)
    return found.reshape(*frames.shape[:2], -1)


def frame_measure(network: Features, batch_size: int) -> Measure:
    """Features (N, T, d) of each frame."""
    return Measure(lambda frames, captions: _of_frames(network, frames, batch_size), network.described())


def clipsim_measure(network: ClipFeatures, batch_size: int) -> Measure:
    """CLIPSIM (N,): 100 × the cosine of a frame's and the caption's embeddings, mean over frames (Wu et al. 2021)."""

    def compute(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        images, texts = unit(_of_frames(network, frames, batch_size)), unit(network.text(captions))
        return 100 * np.einsum("ntd,nd->n", images.astype(np.float64), texts.astype(np.float64)) / frames.shape[1]

    return Measure(compute, network.described())


def motion_measure() -> Measure:
    """`motion.MEASURES` (N, 3)."""
    return Measure(lambda frames, captions: np.stack([motion_of(video) for video in frames]), "1")


def content_measure() -> Measure:
    """A number (N,) for each video that other pixels would not have."""

    def compute(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        digests = (hashlib.blake2b(video.tobytes(), digest_size=8).digest() for video in frames)
        return np.array([int.from_bytes(digest, "big", signed=True) for digest in digests])

    return Measure(compute, "1")


@dataclass(frozen=True)
class Measured:
    """What was computed of a set.

    Attributes:
        videos: those that could be read.
        skipped: the others' names, with the reason.
        values: measure -> (number of videos, ...); `fps` are the clips' rates, NaN where a file does not say it.
        kept: whether nothing of it had to be computed any more.
    """

    videos: Sequence[Video]
    skipped: Mapping[str, str]
    values: Mapping[str, np.ndarray]
    kept: bool = False

    def only(self, places: Sequence[int]) -> "Measured":
        """The same of some of the videos, in this order."""
        values = {name: found[list(places)] for name, found in self.values.items()}
        return Measured([self.videos[place] for place in places], self.skipped, values, self.kept)

    def contents(self) -> dict[str, Any]:
        """How many were read, and a SHA-256 that other pixels under the same names would not have."""
        state = hashlib.sha256(np.sort(self.values["content"]).tobytes())
        return {"num_videos": len(self.videos), "sha256": state.hexdigest()}

    def fps(self) -> list[float] | None:
        """The lowest and the highest rate of the clips; None where no file says it."""
        known = self.values["fps"][np.isfinite(self.values["fps"])]
        return [round(float(value), 3) for value in (known.min(), known.max())] if len(known) else None


@dataclass(frozen=True)
class Processes:
    """Who of how many this process is, how to wait for the others, and how to part with them for good."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    part: Callable[[], None] = lambda: None


def measure(
    videos: VideoSet,
    window: Window,
    seed: int,
    measures: Mapping[str, Measure],
    folder: Path,
    processes: Processes | None = None,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda shards, name: shards,
) -> Measured:
    """Compute what is not in `folder` yet, each process its share, then read all of it.

    What could not be read before is tried again: its file may be as it was, and its rights or a codec mended.

    Args:
        videos, window, seed: what is read of each video.
        measures: name -> what is computed.
        folder: where a file for each measure and shard is kept. It serves again only where videos, window, seed and
            network are the same.
        processes: for several; all of them must call this.
        progress: wraps the numbers of the shards that are worked on.
    """
    processes = processes or Processes()
    shards = _shards(videos)
    paths = [
        {name: folder / _file_name(name, number, shard, window, seed, each.key) for name, each in measures.items()}
        for number, shard in enumerate(shards)
    ]
    pending = [number for number in range(len(shards)) if not all(map(_is_settled, paths[number].values()))]
    before = _written(paths)
    processes.wait()  # nobody writes before everybody has looked, so that all share the same list
    for number in progress(pending[processes.index :: processes.count], videos.name):
        _measure_shard(shards[number], number * SHARD, window, seed, measures, paths[number])
    processes.wait()
    if processes.index == 0:
        files = {name: [path[name].name for path in paths] for name in measures}
        _write_index(folder / INDEX_NAME, videos, files, _recipe(window, seed, measures))
    return replace(_gathered(videos, shards, paths, list(measures)), kept=_written(paths) == before)


def _written(paths: Sequence[Mapping[str, Path]]) -> list[int | None]:
    """When each file of features was written; None where there is none."""
    files = (path for row in paths for path in row.values())
    return [path.stat().st_mtime_ns if path.is_file() else None for path in files]


class Kept(NamedTuple):
    """The features of a set that an earlier call measured, whose files may be elsewhere by now."""

    videos: VideoSet
    paths: Sequence[Mapping[str, Path]]  # of each shard, by measure

    def read(self) -> Measured:
        """What was computed of the set, its videos under their names within it."""
        shards = _shards(self.videos)
        return replace(_gathered(self.videos, shards, self.paths, list(self.paths[0])), kept=True)


def measured_before(folder: Path, window: Window, seed: int, measures: Mapping[str, Measure]) -> Kept | None:
    """What the last call of `measure` left in a folder; None if it was of another kind, or files are gone."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    found = json.loads(index.read_text(encoding="utf-8"))
    if found.pop("recipe") != _recipe(window, seed, measures) or found.pop("shard") != SHARD:
        return None
    files: dict[str, list[str]] = found.pop("files")
    paths = [{name: folder / file for name, file in zip(files, row)} for row in zip(*files.values())]
    if not all(path.is_file() for row in paths for path in row.values()):
        return None
    videos = [Video(name, caption, own_seed, _gone, None) for name, caption, own_seed in found.pop("videos")]
    return Kept(VideoSet(videos=videos, **found), paths)


def _gone(window: Window, start: float) -> np.ndarray:
    raise NotImplementedError("of a set that was measured before there are the features alone")


def _write_index(path: Path, videos: VideoSet, files: Mapping[str, Sequence[str]], recipe: str) -> None:
    """Say which files hold a set's features, without a word on where on this machine the set lies."""
    about = {
        "recipe": recipe,
        "shard": SHARD,
        "files": files,
        "name": videos.name,
        "source": public_name(videos.source, given=True),
        "videos": [[videos.within(video.name), video.caption, video.seed] for video in videos.videos],
        "skipped": videos.public(videos.skipped),
        "settings": videos.settings,
        "steps": videos.steps,
        "steps_by_name": videos.steps_by_name,
        "remarks": list(videos.remarks),
    }
    write_text(path, json.dumps(about) + "\n")


def _shards(videos: VideoSet) -> list[Sequence[Video]]:
    return [videos.videos[start : start + SHARD] for start in range(0, len(videos.videos), SHARD)]


def _recipe(window: Window, seed: int, measures: Mapping[str, Measure]) -> str:
    """A digest of what decides the features of a video."""
    recipe = [FORMAT, window, seed, sorted((name, each.key) for name, each in measures.items())]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _file_name(name: str, number: int, shard: Sequence[Video], window: Window, seed: int, key: Any) -> str:
    recipe = [FORMAT, window, seed, key, [(video.name, video.caption, video.stamp) for video in shard]]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{name}-{number:05d}-{digest[:16]}.safetensors"


def _measure_shard(
    shard: Sequence[Video], first: int, window: Window, seed: int, measures: Mapping[str, Measure], paths: Mapping
) -> None:
    from safetensors.numpy import save_file

    frames, used, rates, skipped = list[np.ndarray](), list[int](), list[float](), dict[str, str]()
    for place, video in enumerate(shard):
        try:
            clip, rate = video.read(window, window.start(seed, first + place)), window.rate(video.rate())
        except UnusableItem as reason:
            skipped[str(place)] = str(reason)
            continue
        frames.append(clip)
        rates.append(rate)
        used.append(place)
    captions = [shard[place].caption for place in used]
    for name, path in paths.items():
        if path.is_file() and _of_which(path) == (used, skipped):
            continue
        values = measures[name].compute(np.stack(frames), captions) if used else np.zeros(0)
        with atomic_file(path) as temporary:
            tensors = {"values": np.ascontiguousarray(values), "fps": np.array(rates, dtype=np.float64)}
            tensors["used"] = np.array(used, dtype=np.int64)
            save_file(tensors, temporary, {"skipped": json.dumps(skipped)})


def _of_which(path: Path) -> tuple[list[int], dict[str, str]]:
    """The places in its shard of the videos that a file has features of, and of those that it lacks, with reasons."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.get_tensor("used").tolist(), json.loads(file.metadata()["skipped"])


def _is_settled(path: Path) -> bool:
    """Whether a file is there and has features of every video of its shard."""
    return path.is_file() and not _of_which(path)[1]


def _gathered(
    videos: VideoSet, shards: Sequence[Sequence[Video]], paths: Sequence[Mapping[str, Path]], names: Sequence[str]
) -> Measured:
    from safetensors import safe_open

    used, skipped = list[Video](), dict(videos.skipped)
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "fps")}
    for shard, files in zip(shards, paths):
        places, reasons = _of_which_all(files)
        for name, path in files.items():
            with safe_open(path, "np") as file:
                if places:
                    values[name].append(file.get_tensor("values"))
                rates = file.get_tensor("fps")
        values["fps"].append(rates)
        used += [shard[place] for place in places]
        skipped |= {shard[int(place)].name: reason for place, reason in reasons.items()}
    if len(used) < 2:
        name, reason = next(iter(skipped.items()), ("", "there are no others"))
        raise ValueError(
            f"expected at least 2 videos of {videos.source} that can be used, got {len(used)}; for example {name}:"
            f" {reason}"
        )
    return Measured(used, skipped, {name: np.concatenate(found) for name, found in values.items()})


def _of_which_all(files: Mapping[str, Path]) -> tuple[list[int], dict[str, str]]:
    """`_of_which` of the files of a shard, one for each measure; `ValueError` unless they are of the same videos."""
    found = {name: _of_which(path) for name, path in files.items()}
    (first, (places, reasons)), *others = found.items()
    for name, (other, _) in others:
        if other != places:
            raise ValueError(
                f"expected {first} and {name} of the same videos in {files[name].parent}, got {len(places)} and"
                f" {len(other)} of one shard: delete that folder, and measure again"
            )
    return places, reasons
