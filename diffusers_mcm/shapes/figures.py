"""Measures teacher, MCM and LCM on every held-out caption, paired, and says which targets are reached."""

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_takes_files, write_text
from ..tables import replace_section, table
from .captions import Caption, held_out_captions, spaced, training_captions
from .methods import LCM_METHODS, MCM_METHODS, TEACHER_METHODS, Method, Networks, machine
from .render import render_video
from .scores import ATTRIBUTES, METRICS, estimates, interval, outcomes, read, resampled_captions
from .targets import checks

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SEARCH_SEED = 1000  # none of the seeds that are measured
TRUTH = {"truth-video": "video", "truth-clean": "clean"}
READERS = ("oracle", "steadiness")  # the modules on which depends what is read off a video
_WITH_INTERVAL = ("all_right", "identity_kept", "wobble", "watermark_seen", "sharpness", "displacement", "spread")


class Study:
    """Samples and reads methods, keeping every finished one in `folder`.

    What is kept serves again only if the weights, the method, the captions, the seeds and the oracle are the same.
    """

    def __init__(self, networks: Networks, folder: Path, batch_size: int = 16):
        self.networks, self.folder, self.batch_size = networks, folder, batch_size
        self._digests: dict[str, str] = {}

    def readings(self, method: Method, captions: Sequence[Caption], seeds: Sequence[int]) -> list[list[dict]]:
        """Per caption and seed what the oracle reads off the method's video."""
        name, sample = f"{method.name}-guidance-{method.guidance:g}", partial(self.networks.sample, method)
        return self._kept(name, [*method[3:], self._digest(method.network)], sample, captions, seeds)

    def truth(self, name: str, captions: Sequence[Caption], seeds: Sequence[int]) -> list[list[dict]]:
        """The same of what the renderer draws."""

        def render(prompts: Sequence[Caption], prompt_seeds: Sequence[int]) -> list[np.ndarray]:
            return [render_video(prompt, seed, TRUTH[name]) for prompt, seed in zip(prompts, prompt_seeds)]

        return self._kept(name, [name, source_digest("render")], render, captions, seeds)

    def best_guidance(
        self, method: Method, guidances: Sequence[float], captions: Sequence[Caption]
    ) -> tuple[float, dict[float, float]]:
        """The guidance with most all right (then most attributes right, then the smaller), and each one's share."""
        scores = {}
        for guidance in guidances:
            candidate = method._replace(name=f"search-{method.name}", guidance=guidance)
            found = outcomes(self.readings(candidate, captions, [SEARCH_SEED]), captions)
            attributes = float(np.mean([found[attribute] for attribute in ATTRIBUTES]))
            scores[guidance] = (float(found["all_right"].mean()), attributes, -guidance)
        return max(scores, key=scores.__getitem__), {guidance: score[0] for guidance, score in scores.items()}

    def _kept(
        self, name: str, recipe: list, make: Callable, captions: Sequence[Caption], seeds: Sequence[int]
    ) -> list[list[dict]]:
        pairs = [(caption, seed) for caption in captions for seed in seeds]
        recipe = [*recipe, *map(source_digest, READERS), [[str(caption), seed] for caption, seed in pairs]]
        key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
        path = self.folder / f"{name}-{key[:12]}.json"
        if path.exists():
            flat = json.loads(path.read_text())["readings"]
        else:
            flat = []
            for start in range(0, len(pairs), self.batch_size):
                prompts, prompt_seeds = zip(*pairs[start : start + self.batch_size])
                flat += [read(video) for video in make(prompts, prompt_seeds)]
                print(f"\r{name}: {len(flat)} of {len(pairs)}", end="", flush=True)
            print()
            write_text(path, json.dumps({"recipe": recipe, "readings": flat}))
        return [flat[start : start + len(seeds)] for start in range(0, len(flat), len(seeds))]

    def _digest(self, network: str) -> str:
        """What the loaded weights hash to."""
        if network not in self._digests:
            digest = hashlib.sha256(str(self.networks.pipeline(network).scheduler.config).encode())
            for name, part in sorted(self.networks.pipeline(network).components.items()):
                for key, tensor in getattr(part, "state_dict", dict)().items():
                    digest.update(f"{name}.{key}".encode())
                    digest.update(tensor.detach().float().cpu().numpy().tobytes())
            self._digests[network] = digest.hexdigest()
        return self._digests[network]


def source_digest(module: str) -> str:
    """SHA-256 of the source of a module of the shapes world: by that a change of what it reads or draws is noticed."""
    return hashlib.sha256((Path(__file__).parent / f"{module}.py").read_bytes()).hexdigest()


def time_methods(
    networks: Networks, methods: Sequence[Method], captions: Sequence[Caption], runs: int, batch_size: int = 1
) -> dict[str, float]:
    """Median seconds per video, prompt to pixels; the methods take turns so that load falls on all."""
    prompts = [captions[index % len(captions)] for index in range(runs + batch_size - 1)]
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    spans = [range(turn, turn + batch_size) for turn in range(runs)]
    for method, _, spent in networks.timed_in_turns(methods, [(prompts[s.start : s.stop], s) for s in spans]):
        seconds[method.name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def method_rows(results: Mapping) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """`figures.json`, or its `methods` alone -> their table: each label with its cells by column, and the columns."""
    rows = []
    for method in results["methods"].values():
        cells = {"guidance": "–" if method["guidance"] is None else f"{method['guidance']:g}"}
        for name, metric in METRICS.items():
            estimate, low, high = (math.nan if value is None else value for value in method[name])
            cells[metric.title] = metric.format(estimate)
            if name in _WITH_INTERVAL and not math.isnan(estimate):
                cells[metric.title] += f" ({metric.format(low)} to {metric.format(high)})"
        cells |= {_seconds_title(size): f"{seconds:.2f}" for size, seconds in method["seconds"].items()}
        rows.append((method["label"], cells))
    timed = [_seconds_title(size) for size in next(iter(results["methods"].values()))["seconds"]]
    return rows, ["guidance", *(metric.title for metric in METRICS.values()), *timed]


def score_table(about: str, results: Mapping) -> dict[str, Any]:
    """What `method_rows` takes -> the table of methods as a model card takes it from `scores.json`."""
    rows, columns = method_rows(results)
    return {"about": about, "columns": columns, "rows": [[label, *map(cells.get, columns)] for label, cells in rows]}


def _seconds_title(batch_size: str) -> str:
    return "seconds" if batch_size == "1" else f"seconds, {batch_size} at once"


def report(results: Mapping) -> tuple[str, str]:
    """`figures.json` -> the table of methods and the table of checks, in markdown."""
    words = {True: "yes", False: "**no**", None: "–"}
    checked = [(c["name"], {**c, "reached": words[c["reached"]]}) for c in results["checks"]]
    return table(*method_rows(results)), table(checked, ["target", "measured", "reached"])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _measured(name: str, draws: Mapping[str, np.ndarray], seconds: Mapping[int, Mapping[str, float]]) -> dict:
    """What `figures.json` holds of one method's draws and times."""
    times = {str(size): of_methods[name] for size, of_methods in seconds.items() if name in of_methods}
    return {"seconds": times} | {
        metric: [_plain(value) for value in interval(values)] for metric, values in draws.items()
    }


def measure(arguments: argparse.Namespace) -> dict:
    """Sample, read, time and compare; what `figures.json` holds."""
    captions = held_out_captions()[: arguments.captions]
    search_captions = spaced(training_captions(), arguments.search_captions)
    seeds = list(range(arguments.seeds))
    sources = {"teacher": arguments.teacher, "mcm": arguments.mcm, "lcm": arguments.lcm}
    networks = Networks(sources, arguments.device)
    study = Study(networks, arguments.output / "readings", arguments.batch_size)

    methods, searches = [], {}
    for method in TEACHER_METHODS:
        best, searches[method.name] = study.best_guidance(method, arguments.guidances, search_captions)
        methods.append(method._replace(guidance=best))
    methods += [*MCM_METHODS, *(LCM_METHODS if arguments.lcm else ())]

    rows = resampled_captions(len(captions))
    readings = {method.name: study.readings(method, captions, seeds) for method in methods}
    readings |= {name: study.truth(name, captions, seeds) for name in TRUTH}
    draws = {
        name: {metric: estimates(values, rows) for metric, values in outcomes(found, captions).items()}
        for name, found in readings.items()
    }
    seconds = {
        size: time_methods(networks, methods, captions, arguments.timing_runs, size)
        for size in sorted({1, arguments.batch_size})
    }
    labels = {name: f"rendered truth, {domain}" for name, domain in TRUTH.items()} | {m.name: m.label for m in methods}
    guidances = {method.name: method.guidance for method in methods}
    return {
        "captions": [str(caption) for caption in captions],
        "seeds": seeds,
        "sources": {name: source for name, source in sources.items() if source},
        "machine": machine(arguments.device),
        "guidance_search": {name: {f"{g:g}": _plain(s) for g, s in found.items()} for name, found in searches.items()},
        "methods": {
            name: {"label": labels[name], "guidance": guidances.get(name)} | _measured(name, found, seconds)
            for name, found in draws.items()
        },
        "checks": [
            check._asdict() for check in checks(lambda name, metric: draws[name][metric], seconds, bool(arguments.lcm))
        ],
    }


def build_parser() -> argparse.ArgumentParser:
    """The flags of `diffusers-mcm shapes figures`."""
    parser = argparse.ArgumentParser(prog="diffusers-mcm shapes figures", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("figures"), help="folder for figures, scores.json and the readings")
    add("--teacher", default="mcm-shapes-teacher", help="base model: packaged, folder or Hub id")
    add("--mcm", default="mcm-shapes", help="MCM LoRA: packaged, folder or Hub id")
    add("--lcm", help="plain LCM LoRA of the same data and steps, the control")
    add("--captions", type=int, default=None, help="only the first of the held-out captions (default: all)")
    add("--seeds", type=int, default=4, help="seeds 0, 1, … per caption")
    add("--guidances", type=float, nargs="+", default=GUIDANCES, help="among which the teacher's best is sought")
    add("--search_captions", type=int, default=40, help="training captions on which it is sought")
    add("--batch_size", type=int, default=16, help="videos at once; timing takes one at a time as well")
    add("--timing_runs", type=int, default=5, help="how often each method is timed")
    add("--device", default=None, help="cpu, cuda … (default: the best there is)")
    add("--checks", action="store_true", help="print only the table of targets, measured and reached")
    add("--readme", type=Path, help="file whose <!-- figures --> section takes the tables")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`diffusers-mcm shapes figures`."""
    from ..devices import choose_device

    arguments = build_parser().parse_args(argv)
    for name in ("captions", "seeds", "search_captions", "batch_size", "timing_runs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"expected --{name} of at least 1, got {value}")
    check_takes_files(arguments.output, "--output")
    arguments.device = choose_device(arguments.device)
    results = measure(arguments)
    methods, checked = report(results)
    about = (
        f"{len(results['captions'])} held-out captions × {len(results['seeds'])} seeds; seconds per video, prompt to "
        f"pixels, one at a time if nothing else is said, on {results['machine']}."
    )
    text = f"{about}\n\n{methods}\n\n{checked}\n"
    write_text(arguments.output / "figures.json", json.dumps(results, indent=2) + "\n")
    write_text(arguments.output / "figures.md", text)
    scores = score_table(about, results)
    write_text(arguments.output / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    if arguments.readme:
        replace_section(arguments.readme, "figures", text)
    print(checked if arguments.checks else text)
    print(f"Written to {arguments.output / 'figures.json'} and {arguments.output / 'figures.md'}")
