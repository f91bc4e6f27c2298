"""What the tables of flow-matching models in the shapes world are measured with: the oracle, as in the figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_mcm.files import write_text
from diffusers_mcm.scheduler import MCMFlowScheduler
from diffusers_mcm.shapes.captions import Caption, held_out_captions, spaced, training_captions
from diffusers_mcm.shapes.figures import Study, score_table
from diffusers_mcm.shapes.methods import Method, Networks
from diffusers_mcm.shapes.scores import METRICS, estimates, interval, outcomes, resampled_captions

WINDOW = 16  # frames of each video that are read: what the packaged world has


class FlowNetworks(Networks):
    """Networks of which some are sampled with `schedulers` instead of the one they came with, by name."""

    def __init__(self, sources: Mapping[str, Any], schedulers: Mapping[str, MCMFlowScheduler]):
        super().__init__({name: str(source) for name, source in sources.items()})
        self.schedulers = schedulers

    def pipeline(self, network: str):
        pipeline = super().pipeline(network)
        pipeline.scheduler = self.schedulers.get(network, pipeline.scheduler)
        return pipeline

    def sample(self, method: Method, prompts: Sequence[Caption | str], seeds: Sequence[int]) -> np.ndarray:
        return super().sample(method, prompts, seeds)[:, :WINDOW]


def captions_of(training: int | None) -> list[Caption]:
    """The held-out captions, or so many of those of the training, to choose settings by."""
    return spaced(training_captions(), training) if training else held_out_captions()


def scores(study: Study, method: Method, captions: Sequence[Caption], seeds: int) -> dict[str, Any]:
    """A method's line of the table: every metric as [estimate, lower, upper] of its 95 % interval over captions."""
    found = outcomes(study.readings(method, captions, range(seeds)), captions)
    rows = resampled_captions(len(captions))
    line: dict[str, Any] = {"label": method.label, "steps": method.steps, "guidance": method.guidance}
    for name in METRICS:
        values = interval(estimates(found[name], rows))
        line[name] = [None if np.isnan(value) else round(value, 5) for value in values]
    return line


def add_scores(file: Path, protocol: Mapping[str, Any], study: Study, methods: Sequence[Method]) -> None:
    """Write the methods' lines into a JSON file, beside those that are there already, and the table for a model card.

    ValueError if those were measured in another way, or lack a metric of today.
    """
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"protocol": protocol, "methods": {}}
    if record["protocol"] != json.loads(json.dumps(protocol)):
        raise ValueError(
            f"expected what {file} was measured with, {record['protocol']}, got {dict(protocol)}: name another file"
        )
    if lacking := sorted({name for line in record["methods"].values() for name in METRICS if name not in line}):
        raise ValueError(f"expected all metrics in {file}, of which it lacks {', '.join(lacking)}: name another file")
    captions = captions_of(protocol["training_captions"])
    kind = "training" if protocol["training_captions"] else "held-out"
    about = f"{len(captions)} {kind} captions × {protocol['seeds']} seeds, {WINDOW} frames of each video."
    for method in methods:
        line = record["methods"][method.name] = scores(study, method, captions, protocol["seeds"])
        timeless = {name: {**line, "seconds": {}} for name, line in record["methods"].items()}
        record["table"] = score_table(about, {"methods": timeless})
        write_text(file, json.dumps(record, indent=1) + "\n")
        shown = ("all_right", "shape", "motion", "watermark_seen", "displacement", "sharpness", "flicker")
        print(f"{method.label}: " + ", ".join(f"{name} {line[name][0]}" for name in shown), flush=True)
