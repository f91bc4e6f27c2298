"""Measures folders of videos against a reference: the call behind `diffusers-mcm evaluate`."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.columns import IMAGES
from ..files import write_text
from ..hub import public_name
from .distances import COVARIANCES, resampled
from .measuring import (
    Measure,
    Measured,
    Processes,
    clipsim_measure,
    frame_measure,
    measure,
    motion_measure,
    video_measure,
)
from .metrics import DEFAULT, Column, Score, columns_of, difference, draws_of, mean_score
from .motion import MEASURES
from .networks import CLIP_SOURCE, FRAME_NETWORKS, VIDEO_NETWORKS, Choice, ClipFeatures, load_clip
from .results import Difference, Evaluation, Method, check_protocols
from .videos import WINDOWS, VideoSet, Window, open_reference, open_samples, size_of

STEPS = "num_inference_steps"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an evaluation is done; everything but the last three is part of its protocol.

    Attributes:
        metrics: out of `metrics.METRICS`; motion is always measured.
        num_videos: of the reference, chosen by `seed`; None takes all.
        seed: chooses the reference's videos, their captions and random windows.
        num_frames: of a clip.
        frame_interval: of the reference's clips: every how many frames of a file one is taken.
        fps: takes the reference's frames at this rate instead.
        window: "centre", "start" or "random", of the reference; samples are read from their first frame, each frame.
        size: (height, width) of all clips; None takes that of the first sample.
        video_networks, frame_networks: rows of the tables in `networks`, `row` or `row=weights`.
        clip: the CLIP of CLIPSIM.
        covariance: "sample" (N − 1) or "population" (N).
        resamples: of the captions, for the intervals of differences; 0 for none.
        batch_size: videos that go through a network at once.
        device: where the networks run.
    """

    metrics: Sequence[str] = DEFAULT
    num_videos: int | None = None
    seed: int = 0
    num_frames: int = 16
    frame_interval: int = 1
    fps: float | None = None
    window: str = "centre"
    size: tuple[int, int] | None = None
    video_networks: Sequence[str] = ("videomae",)
    frame_networks: Sequence[str] = ("dinov2",)
    clip: str = CLIP_SOURCE
    covariance: str = "sample"
    resamples: int = 200
    batch_size: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        bounds: dict[str, float] = {"num_frames": 3, "frame_interval": 1, "num_videos": 2, "seed": 0, "fps": 0.01}
        for name, least in {**bounds, "resamples": 0, "batch_size": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"expected --{name} of at least {least}, got {value}")
        for name, known in (("window", WINDOWS), ("covariance", COVARIANCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected --{name} out of {', '.join(known)}, got {getattr(self, name)!r}")

    def chosen(self) -> tuple[list[Choice], list[Choice], list[Column]]:
        """The networks of videos and of frames that the metrics need, and the columns of the results."""
        videos = [Choice.parse(text, VIDEO_NETWORKS) for text in self.video_networks]
        frames = [Choice.parse(text, FRAME_NETWORKS) for text in self.frame_networks]
        columns = columns_of(self.metrics, [c.row for c in videos], [c.row for c in frames])
        used = {(column.metric.features, column.network) for column in columns}
        return (
            [c for c in videos if ("video", c.row) in used],
            [c for c in frames if ("frame", c.row) in used],
            columns,
        )


def evaluate(
    folders: Mapping[str, str | os.PathLike],
    reference: str,
    output: str | os.PathLike,
    options: Options | None = None,
    images: str | None = None,
    processes: Processes | None = None,
    progress: Callable[[Sequence[int], str], Any] = lambda shards, name: shards,
    versions: Mapping[str, str] | None = None,
) -> Evaluation:
    """Measure folders of videos, and write `evaluation.json`, `evaluation.md` and a picture into `output`.

    Features are kept in `output/features`, so that a run that was stopped goes on. Results that are there already by
    the same protocol stay beside the new ones.

    Args:
        folders: name -> a folder of samples, see `videos.open_samples`.
        reference: real videos with captions, whatever `data.sources.open_rows` opens.
        output: a folder.
        options: how it is done.
        images: real images that frames are compared with, instead of the reference's own frames.
        processes: for several; only the first one writes results.
        progress: as in `measuring.measure`.
        versions: of further packages, for the record beside those that compute the numbers.

    Raises:
        ValueError: for folders that hold no videos, captions or numbers of videos that differ between the methods,
            and results of another protocol in `output`.
    """
    options, processes = options or Options(), processes or Processes()
    before = Evaluation.read(output)
    video_choices, frame_choices, columns = options.chosen()
    samples = [open_samples(folder, name) for name, folder in folders.items()]
    check_alike(samples)
    size = options.size or size_of(samples[0].videos)
    window = Window(options.num_frames, options.frame_interval, options.fps, options.window, *size)
    real = open_reference(reference, options.num_videos, options.seed)
    pictures = open_reference(images, None, options.seed, IMAGES, "images") if images else None

    measures, networks = load_measures(video_choices, frame_choices, columns, options)
    protocol = {
        "reference": real.described(),
        "images": pictures.described() if pictures else None,
        "samples": {"num_videos": len(samples[0].videos), "captions": samples[0].captions_digest()},
        "window": window._asdict(),
        "seed": options.seed,
        "networks": networks,
        "covariance": options.covariance,
    }
    if before is not None:
        check_protocols(before.protocol, protocol, str(output))  # before the work, not after it

    def measured(videos: VideoSet, how: Window, names: Sequence[str]) -> Measured:
        folder = Path(output, "features", videos.name)
        chosen = {name: measures[name] for name in names}
        return measure(videos, how, options.seed, chosen, folder, processes, progress)

    of_frames = [name for name in measures if name.startswith("frame.")]
    truth = measured(real, window, [name for name in measures if not (images and name in of_frames)])
    targets = dict(truth.values)
    if pictures:
        targets |= measured(pictures, window, of_frames).values
    as_written = window._replace(frame_interval=1, fps=None, place="start")
    results = {videos.name: measured(videos, as_written, list(measures)) for videos in samples}

    scores = {name: scores_of(result, targets, columns, options.covariance) for name, result in results.items()}
    methods = {videos.name: _method(videos, results[videos.name], scores[videos.name]) for videos in samples}
    differences = differences_of(results, scores, options.resamples, options.seed)
    alone = [column for column in columns if column.metric.against is None]
    described = _method(real, truth, scores_of(truth, {}, alone, options.covariance))
    found = Evaluation(protocol, {**(versions or {}), **computed_by()}, described, methods, differences)
    found = found.with_others(before, str(output))
    if processes.index == 0:
        found.write(output, columns)
    return found


def check_alike(samples: Sequence[VideoSet]) -> None:
    """`ValueError` unless there are samples, and all folders show the same captions, each as often."""
    if not samples:
        raise ValueError("expected at least one folder of samples, got none")
    first = samples[0]
    for other in samples[1:]:
        if len(other.videos) != len(first.videos):
            raise ValueError(
                f"expected as many videos in every folder, got {len(first.videos)} in {first.source} and "
                f"{len(other.videos)} in {other.source}: a Fréchet distance grows as the number falls"
            )
        if other.captions_digest() != first.captions_digest():
            raise ValueError(
                f"expected the same captions in every folder, but {other.source} shows others than {first.source}: "
                "make both from one list of prompts"
            )


def load_measures(
    videos: Sequence[Choice], frames: Sequence[Choice], columns: Sequence[Column], options: Options
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """What is computed of each video, and what the protocol says of the networks.

    Raises:
        ValueError: where a network does not take clips of so many frames.
    """
    measures, networks = dict[str, Measure](), dict[str, Any]()
    for kind, choices, table in (("video", videos, VIDEO_NETWORKS), ("frame", frames, FRAME_NETWORKS)):
        for choice in choices:
            network = table[choice.row].load(choice.source).to(options.device)
            make = frame_measure
            if kind == "video":
                network.check_frames(options.num_frames, choice.row)
                make = video_measure
            measures[f"{kind}.{choice.row}"] = make(network, options.batch_size)
            networks[choice.row] = {"weights": public_name(choice.source), **network.described()}
    if any(column.metric.features == "clip" for column in columns):
        clip: ClipFeatures = load_clip(options.clip).to(options.device)
        measures["clipsim"] = clipsim_measure(clip, options.batch_size)
        networks["clipsim"] = {"weights": public_name(options.clip), **clip.described()}
    measures["motion"] = motion_measure()
    return measures, networks


def scores_of(
    measured: Measured, targets: Mapping[str, np.ndarray], columns: Sequence[Column], covariance: str
) -> dict[str, Score]:
    """Column's key -> the score of a method, as a function of the videos that count."""
    scores = dict[str, Score]()
    for column in columns:
        if column.metric.against is not None:
            name = f"{column.metric.features}.{column.network}"
            scores[column.key] = column.metric.against(targets[name], covariance)(measured.values[name])
        elif column.metric.features == "clip":
            scores[column.key] = mean_score(measured.values["clipsim"])
        else:
            place = list(MEASURES).index(column.key.partition(".")[2])
            scores[column.key] = mean_score(measured.values["motion"][:, place])
    return scores


def _method(videos: VideoSet, measured: Measured, scores: Mapping[str, Score]) -> Method:
    everything = np.arange(len(measured.videos))
    steps = videos.settings.get(STEPS)
    return Method(
        source=public_name(videos.source, given=True),
        num_videos=len(measured.videos),
        num_captions=len({video.caption for video in measured.videos}),
        skipped=dict(measured.skipped),
        steps=steps if isinstance(steps, int) else None,
        settings=dict(videos.settings),
        values={key: float(score(everything)) for key, score in scores.items()},
    )


def differences_of(
    results: Mapping[str, Measured], scores: Mapping[str, Mapping[str, Score]], resamples: int, seed: int
) -> list[Difference]:
    """Between all pairs of methods, each with its paired interval over captions; none without `resamples`.

    Where a caption is lost to one of the methods, because none of its videos could be read, it is lost to all.
    """
    if len(results) < 2 or resamples < 2:
        return []
    by_caption = {name: _by_caption(measured) for name, measured in results.items()}
    common = sorted(set.intersection(*(set(groups) for groups in by_caption.values())))
    if len(common) < 2:
        return []
    drawn = resampled(len(common), resamples, seed)
    groups = {name: [found[caption] for caption in common] for name, found in by_caption.items()}
    whole = {
        (name, key): float(score(np.concatenate(groups[name])))
        for name in results
        for key, score in scores[name].items()
    }
    draws = {(name, key): draws_of(scores[name][key], groups[name], drawn) for name, key in whole}
    return [
        Difference(b, a, key, difference(whole[b, key], whole[a, key], draws[b, key], draws[a, key]))
        for a, b in itertools.combinations(results, 2)
        for key in scores[a]
    ]


def _by_caption(measured: Measured) -> dict[str, np.ndarray]:
    numbers: dict[str, list[int]] = {}
    for number, video in enumerate(measured.videos):
        numbers.setdefault(video.caption, []).append(number)
    return {caption: np.array(rows) for caption, rows in numbers.items()}


def computed_by() -> dict[str, str]:
    """The versions of the packages that compute the numbers."""
    import av
    import torch
    import transformers

    modules = {"torch": torch, "transformers": transformers, "numpy": np, "av": av}
    return {name: module.__version__ for name, module in modules.items()}


def write_prompts(path: str | Path, reference: str, num_videos: int | None, seed: int) -> int:
    """Write a list for `generate --prompts`: the captions of the reference's videos that `evaluate` would read.

    Each has a seed of its own: with one seed for all, all videos would begin with the same noise.

    Returns:
        How many prompts were written.
    """
    videos = open_reference(reference, num_videos, seed).videos
    drawn = np.random.default_rng([seed, 3]).choice(2**31, len(videos), replace=False).tolist()
    lines = [
        json.dumps({"prompt": video.caption, "seed": number}, ensure_ascii=False) + "\n"
        for video, number in zip(videos, drawn)
    ]
    write_text(path, "".join(lines))
    return len(lines)
