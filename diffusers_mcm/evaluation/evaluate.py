"""Measures folders of videos against a reference: the call behind `diffusers-mcm evaluate`."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.columns import IMAGES
from ..files import write_text
from ..hub import public_name
from .distances import COVARIANCES
from .measuring import (
    Kept,
    Measure,
    Measured,
    Processes,
    clipsim_measure,
    content_measure,
    frame_measure,
    measure,
    measured_before,
    motion_measure,
    video_measure,
)
from .metrics import DEFAULT, ESTIMATOR, Against, Column, Score, columns_of, mean_score
from .motion import MEASURES
from .networks import CLIP_SOURCE, FRAME_NETWORKS, VIDEO_NETWORKS, Choice, ClipFeatures, load_clip
from .page import rate_remarks
from .pairing import Progress, check_alike, common, differences_of, warn_of_other_captions
from .records import Method
from .results import Evaluation, check_protocols
from .samples import open_samples, size_of
from .videos import RESIZE, WINDOWS, VideoSet, Window, digest_of, open_reference, seeds_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an evaluation is done; everything but the last three is part of its protocol.

    Attributes:
        metrics: out of `metrics.METRICS`; motion is always measured.
        num_videos: of the reference, chosen by `seed`; None takes all.
        num_images: of real images, where there are any, likewise.
        seed: chooses the reference's videos, their captions, random windows and the images.
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
    num_images: int | None = None
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
        for name, least in {**bounds, "num_images": 2, "resamples": 0, "batch_size": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"expected --{name} of at least {least}, got {value}")
        for name, known in (("window", WINDOWS), ("covariance", COVARIANCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected --{name} out of {', '.join(known)}, got {getattr(self, name)!r}")

    def chosen(self) -> tuple[list[Choice], list[Choice], list[Column]]:
        """The networks of videos and of frames that the metrics need, and the columns of the results."""
        videos = [Choice.parse(text, VIDEO_NETWORKS) for text in self.video_networks]
        frames = [Choice.parse(text, FRAME_NETWORKS) for text in self.frame_networks]
        for choices, flag in ((videos, "video_network"), (frames, "frame_network")):
            twice = [row for row, count in Counter(choice.row for choice in choices).items() if count > 1]
            if twice:
                raise ValueError(f"expected each network once in --{flag}, got {twice[0]} several times")
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
    *,
    images: str | None = None,
    data: Mapping[str, Any] | None = None,
    image_data: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    progress: Progress = lambda items, name: items,
    versions: Mapping[str, str] | None = None,
) -> Evaluation | None:
    """Measure folders of videos, and write `evaluation.json`, `evaluation.md` and a picture into `output`.

    Features are kept in `output/features`, so that a run that was stopped goes on. Methods that are there already by
    the same protocol stay beside the new ones, and are scored with them as if all had been measured in one call, from
    their features; where these are gone their scores stay, without intervals beside the new ones.

    Args:
        folders: name -> a folder of samples, see `samples.open_samples`.
        reference: real videos with captions, whatever `data.sources.open_rows` opens.
        output: a folder.
        options: how it is done.
        images: real images that frames are compared with, instead of the reference's own frames.
        data: how the reference is opened, as fields of `data.columns.DataRequest`: split, columns, revision.
        image_data: how the images are, likewise.
        processes: for several; only the first one scores, writes results and returns them. The others return `None`
            as soon as all has been measured, and nobody waits for them.
        progress: wraps what takes time, with the name of it.
        versions: of further packages, for the record beside those that compute the numbers.

    Raises:
        ValueError: for folders that hold no videos, or other captions than the first one, and for results of another
            protocol in `output`.
    """
    options, processes = options or Options(), processes or Processes()
    before = Evaluation.read(output)
    plan = _plan(folders, reference, images, options, data or {}, image_data or {})
    as_written = plan.window._replace(frame_interval=1, fps=None, place="start")
    earlier = _earlier(before, plan, output, as_written, options.seed)

    def measured(videos: VideoSet, window: Window, names: Iterable[str]) -> Measured:
        folder = Path(output, "features", videos.name)
        return measure(videos, window, options.seed, plan.chosen(names), folder, processes, progress)

    truth = measured(plan.real, plan.window, plan.names(of_frames=None if plan.pictures is None else False))
    shown = None if plan.pictures is None else measured(plan.pictures, plan.window, plan.names(of_frames=True))
    results = {videos.name: measured(videos, as_written, plan.measures) for videos in plan.samples}
    processes.part()  # before the scores, which may take one process longer than any other can wait for it
    if processes.index > 0:
        return None
    results = {name: kept.read() for name, kept in earlier.items()} | results
    found = _scored(plan.beside(earlier), truth, shown, results, options, progress)
    now = {**(versions or {}), **found.versions}
    earlier_versions = {name: method.versions for name, method in before.methods.items()} if before else {}
    methods = {
        name: replace(method, versions=results[name].kept and earlier_versions.get(name) or now)
        for name, method in found.methods.items()
    }
    found = replace(found, versions=now, methods=methods).with_others(before, str(output))
    found.write(output)
    for remark in rate_remarks(found.reference, found.methods):
        logger.warning(remark)
    return Evaluation.read(output)


def _earlier(
    before: Evaluation | None, plan: "_Plan", output: str | os.PathLike, window: Window, seed: int
) -> dict[str, Kept]:
    """What `output` still has of methods that were measured before and are not now; they are scored with the others.

    Raises:
        ValueError: before the work, if they were measured by another protocol, or show other captions.
    """
    if before is None:
        return {}
    known = {key: value for key, value in before.protocol.items() if key not in _KNOWN_AFTERWARDS}
    check_protocols(known, plan.protocol, str(output))
    names = before.methods.keys() - {videos.name for videos in plan.samples}
    found = {
        name: kept
        for name in before.methods
        if name in names
        and (kept := measured_before(Path(output, "features", name), window, seed, plan.chosen(plan.measures)))
    }
    try:
        check_alike([*plan.samples, *(kept.videos for kept in found.values())])
    except ValueError as error:
        raise ValueError(f"{error}; {', '.join(found)} were measured before into {output}: or name another") from error
    return found


_KNOWN_AFTERWARDS = ("samples", "contents", "reference_fps")  # of the protocol, when all has been read


class _Plan(NamedTuple):
    """What an evaluation is going to do, with everything checked that can be checked before it reads a video."""

    samples: list[VideoSet]
    real: VideoSet
    pictures: VideoSet | None
    window: Window
    columns: list[Column]
    measures: dict[str, Measure]
    protocol: dict[str, Any]
    weights: dict[str, str]  # where those of each network came from
    opened: dict[str, Any]  # how the reference was, and which images there are

    def names(self, of_frames: bool | None) -> list[str]:
        """The measures, all of them or those of frames or the others alone."""
        return [name for name in self.measures if of_frames is None or name.startswith("frame.") is of_frames]

    def chosen(self, names: Iterable[str]) -> dict[str, Measure]:
        """These measures, and what tells one content from another."""
        return {name: self.measures[name] for name in names} | {"content": content_measure()}

    def remarks(self) -> list[str]:
        """What a reader has to know of the sets."""
        sets = [self.real, *([] if self.pictures is None else [self.pictures]), *self.samples]
        return [remark for videos in sets for remark in videos.remarks]

    def beside(self, earlier: Mapping[str, Kept]) -> "_Plan":
        """The same with sets that were measured before."""
        return self._replace(samples=[*(kept.videos for kept in earlier.values()), *self.samples])


def _plan(
    folders: Mapping[str, str | os.PathLike],
    reference: str,
    images: str | None,
    options: Options,
    data: Mapping[str, Any],
    image_data: Mapping[str, Any],
) -> _Plan:
    if images is None and (options.num_images is not None or image_data):
        raise ValueError("expected images with --num_images and the other flags on them, got none: give --images")
    video_choices, frame_choices, columns = options.chosen()
    samples = [open_samples(folder, name) for name, folder in folders.items()]
    check_alike(samples)
    size = options.size or size_of(samples)
    window = Window(options.num_frames, options.frame_interval, options.fps, options.window, *size)
    real = open_reference(reference, options.num_videos, options.seed, **data)
    pictures = None
    if images is not None:
        pictures = open_reference(images, options.num_images, options.seed, IMAGES, "(images)", **image_data)
    warn_of_other_captions(samples[0], real)
    measures, networks = load_measures(video_choices, frame_choices, columns, options)
    protocol = {
        "reference": real.described(),
        "images": pictures.described() if pictures else None,
        "window": {**window._asdict(), "resize": RESIZE},
        "seed": options.seed,
        "networks": networks,
        "covariance": options.covariance,
        "kernel distances": ESTIMATOR,
    }
    weights = {choice.row: public_name(choice.source, given=True) for choice in (*video_choices, *frame_choices)}
    if "clipsim" in networks:
        weights["CLIPSIM"] = public_name(options.clip, given=True)
    opened = dict(data) | ({"images": {"source": public_name(images, given=True), **image_data}} if pictures else {})
    return _Plan(samples, real, pictures, window, columns, measures, protocol, weights, opened)


def _scored(
    plan: _Plan,
    truth: Measured,
    shown: Measured | None,
    results: Mapping[str, Measured],
    options: Options,
    progress: Progress,
) -> Evaluation:
    """The results of one call."""
    shared, left_out = common(results)
    captions = sorted(video.caption for video in next(iter(shared.values())).videos)
    read = [each.contents() for each in (truth, shown) if each is not None]
    samples = {"num_videos": len(captions), "captions": digest_of(captions)}
    protocol = plan.protocol | {"samples": samples, "contents": read, "reference_fps": truth.fps()}
    targets = truth.values if shown is None else {**truth.values, **shown.values}
    against = {  # made once for all methods: it takes the reference's moments, or sums its kernel
        column.key: column.metric.against(targets[f"{column.metric.features}.{column.network}"], options.covariance)
        for column in plan.columns
        if column.metric.against is not None
    }
    scores = {name: scores_of(found, against, plan.columns) for name, found in shared.items()}
    values = {name: values_of(shared[name], scores[name]) for name in shared}
    alone = [column for column in plan.columns if column.metric.against is None]
    described = _method(plan.real, truth, values_of(truth, scores_of(truth, {}, alone)))
    described = replace(described, settings=plan.opened)
    if shown is not None and plan.pictures is not None:
        described = replace(described, skipped={**described.skipped, **plan.pictures.public(shown.skipped)})
    notes = [f"{left_out} videos count for no method, because one of them could not be read."] if left_out else []
    return Evaluation(
        protocol,
        {**computed_by(), **plan.weights},
        described,
        {videos.name: _method(videos, shared[videos.name], values[videos.name]) for videos in plan.samples},
        differences_of(shared, scores, values, options.resamples, options.seed, progress),
        [*notes, *plan.remarks()],
        options.resamples,
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
            networks[choice.row] = measures[f"{kind}.{choice.row}"].key
    if any(column.metric.features == "clip" for column in columns):
        clip: ClipFeatures = load_clip(options.clip).to(options.device)
        measures["clipsim"] = clipsim_measure(clip, options.batch_size)
        networks["clipsim"] = measures["clipsim"].key
    measures["motion"] = motion_measure()
    return measures, networks


def scores_of(measured: Measured, against: Mapping[str, Against], columns: Sequence[Column]) -> dict[str, Score]:
    """Column's key -> the score of a method, as a function of the videos that count.

    `against` has what a column's metric makes of the reference, where it needs one.
    """
    scores = dict[str, Score]()
    for column in columns:
        if column.metric.against is not None:
            features = measured.values[f"{column.metric.features}.{column.network}"]
            scores[column.key] = against[column.key](features)
        elif column.metric.features == "clip":
            scores[column.key] = mean_score(measured.values["clipsim"])
        else:
            place = list(MEASURES).index(column.key.partition(".")[2])
            scores[column.key] = mean_score(measured.values["motion"][:, place])
    return scores


def values_of(measured: Measured, scores: Mapping[str, Score]) -> dict[str, float]:
    """The scores on all videos."""
    everything = np.arange(len(measured.videos))
    return {key: float(score(everything)) for key, score in scores.items()}


def _method(videos: VideoSet, measured: Measured, values: Mapping[str, float]) -> Method:
    return Method(
        source=public_name(videos.source, given=True),
        num_videos=len(measured.videos),
        num_captions=len({video.caption for video in measured.videos}),
        skipped=videos.public(measured.skipped),
        steps=videos.steps,
        settings=dict(videos.settings),
        values=dict(values),
        steps_by_name=videos.steps_by_name,
        fps=measured.fps(),
        seeds=seeds_of(measured.videos),
    )


def computed_by() -> dict[str, str]:
    """The versions of the packages that compute the numbers."""
    import av
    import torch
    import transformers

    modules = {"torch": torch, "transformers": transformers, "numpy": np, "av": av}
    return {name: module.__version__ for name, module in modules.items()}


def write_prompts(path: str | Path, reference: str, num_videos: int | None, seed: int, **data: Any) -> int:
    """Write a list for `generate --prompts`: the captions of the reference's videos that `evaluate` would read.

    Each has a seed of its own: with one seed for all, all videos would begin with the same noise. `data` is as in
    `evaluate`. Returns how many prompts were written.
    """
    videos = open_reference(reference, num_videos, seed, **data).videos
    drawn = np.random.default_rng([seed, 3]).choice(2**31, len(videos), replace=False).tolist()
    lines = [
        json.dumps({"prompt": video.caption, "seed": number}, ensure_ascii=False) + "\n"
        for video, number in zip(videos, drawn)
    ]
    write_text(path, "".join(lines))
    return len(lines)
