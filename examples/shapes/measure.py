"""Measures what ablate.py trained, and the teacher's own samplers, at 1, 2, 4 and 8 steps on the held-out captions.

    python examples/shapes/measure.py --runs work/ablate --world world --output examples/shapes/ablation

Each LoRA becomes `ROW-SEED.json` with its training's record, its scores, and the scores on resampled captions that
paired intervals are made of; `protocol.json` says how all of them were measured, spacing and guidance of the samplers
too. What is there already stays.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ablate import ROWS, SEEDS, TEACHER, runs, weights_of
from ablate import STEPS as TRAINED_STEPS

from diffusers_mcm.evaluation.distances import resampled
from diffusers_mcm.evaluation.evaluate import computed_by
from diffusers_mcm.evaluation.measuring import clipsim_measure, frame_measure, motion_measure, video_measure
from diffusers_mcm.evaluation.metrics import Score, draws_of, frechet_scores, mean_score
from diffusers_mcm.evaluation.motion import MEASURES
from diffusers_mcm.evaluation.networks import load_clip, load_dinov2, load_videomae
from diffusers_mcm.files import write_text
from diffusers_mcm.pipelines.samplers import SPACINGS
from diffusers_mcm.shapes.build import compress
from diffusers_mcm.shapes.captions import Caption, held_out_captions, spaced, training_captions
from diffusers_mcm.shapes.figures import GUIDANCES, READERS, Study, source_digest
from diffusers_mcm.shapes.methods import Method, Networks
from diffusers_mcm.shapes.render import render_image, render_video
from diffusers_mcm.shapes.scores import outcomes, read

STEPS = (1, 2, 4, 8)
REFERENCE_SEEDS = range(1000, 1016)  # none that is sampled or that a world was built with
DOMAINS = ("clean", "cartoon")  # of the images of Table 3
ORACLE = ("all_right", "shape", "motion", "identity_kept", "wobble", "flicker", "displacement", "watermark_seen")
DIGITS = 5
SEARCH_CAPTIONS = 40  # of the training, as many as shapes figures takes
GUIDANCE = "the best of seven by the oracle's all right on 40 training captions, as in shapes figures"


class Baseline(NamedTuple):
    """The teacher without distillation: no row of the training, but a line of Table 1."""

    sampler: str
    guidances: dict[int, float]  # at each number of steps that which `--search` finds
    spacing: str = SPACINGS[0]


BASELINES = {
    "teacher-ddim": Baseline("ddim", {1: 2.0, 2: 3.0, 4: 3.0, 8: 2.0}),
    "teacher-dpm": Baseline("dpm++", {1: 2.0, 2: 3.0, 4: 2.0, 8: 2.0}),
}
STUDENT = Baseline("mcm", dict.fromkeys(STEPS, 1.0), "that of the distillation")


class Ruler:
    """The networks, and the features of what is true."""

    def __init__(self, seeds: int, resamples: int, batch_size: int):
        self.captions, self.seeds, self.batch_size = held_out_captions(), range(seeds), batch_size
        clip = load_clip("mcm-shapes-clip")
        video, frames = load_videomae("mcm-shapes-video"), load_dinov2("mcm-shapes-features")
        self.measures = {
            "fvd": video_measure(video, batch_size),
            "fid": frame_measure(frames, batch_size),
            "clipsim": clipsim_measure(clip, batch_size),
            "motion": motion_measure(),
        }
        self.groups = np.arange(len(self.captions) * seeds).reshape(-1, seeds)
        self.drawn = resampled(len(self.captions), resamples)
        self.truth = self._truth()
        self.protocol = {
            "captions": len(self.captions),
            "videos": len(self.captions) * seeds,
            "reference": f"{len(self.captions) * len(REFERENCE_SEEDS)} rendered videos of the same captions, H.264",
            "images": f"{len(self.captions) * len(REFERENCE_SEEDS)} rendered images each, {', '.join(DOMAINS)}",
            "networks": {name: measure.key for name, measure in self.measures.items()},
            "teacher": weights_of(TEACHER),
            "resamples": resamples,
            "seeds": f"0 to {seeds - 1}",
            "readers": {name: source_digest(name) for name in (*READERS, "render")},
            "samplers": {name: described(row) for name, row in (BASELINES | {"trained": STUDENT}).items()},
            "guidance": GUIDANCE,
        }

    def _truth(self) -> dict[str, Callable[[np.ndarray], Score]]:
        """Distances to true videos, and to true images of each domain."""
        pairs = [(caption, seed) for caption in self.captions for seed in REFERENCE_SEEDS]
        videos = (compress(render_video(caption, seed, "video")) for caption, seed in pairs)
        found = {"fvd": frechet_scores(self._features("fvd", videos, len(pairs)), "sample")}
        for domain in DOMAINS:
            images = (render_image(caption, seed, domain)[None] for caption, seed in pairs)
            found[f"fid.{domain}"] = frechet_scores(self._features("fid", images, len(pairs)), "sample")
        return found

    def _features(self, name: str, clips, count: int) -> np.ndarray:
        clips, found = iter(clips), []
        for start in range(0, count, 32):
            batch = np.stack([next(clips) for _ in range(min(32, count - start))])
            found.append(self.measures[name].compute(batch, []))
        return np.concatenate(found)

    def score(self, sample: Callable[[Sequence[Caption], Sequence[int]], np.ndarray]) -> dict[str, Any]:
        """Sample all captions with all seeds: column -> score and, where there is noise to tell apart, its draws."""
        pairs = [(caption, seed) for caption in self.captions for seed in self.seeds]
        features: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        readings = []
        for start in range(0, len(pairs), self.batch_size):
            captions, seeds = zip(*pairs[start : start + self.batch_size])
            frames = sample(captions, seeds)
            for name, measure in self.measures.items():
                features[name].append(measure.compute(frames, [str(caption) for caption in captions]))
            readings += [read(video) for video in frames]
        of = {name: np.concatenate(parts) for name, parts in features.items()}
        scores: dict[str, Score] = {"fvd": self.truth["fvd"](of["fvd"]), "clipsim": mean_score(of["clipsim"])}
        scores |= {f"fid.{domain}": self.truth[f"fid.{domain}"](of["fid"]) for domain in DOMAINS}
        scores |= {f"motion.{name}": mean_score(of["motion"][:, place]) for place, name in enumerate(MEASURES)}
        everything = np.arange(len(pairs))
        values = {name: score(everything) for name, score in scores.items()}
        by_caption = [readings[start : start + len(self.seeds)] for start in range(0, len(readings), len(self.seeds))]
        found = outcomes(by_caption, self.captions)
        values |= {f"oracle.{name}": float(np.nanmean(found[name])) for name in ORACLE}
        draws = {name: draws_of(scores[name], self.groups, self.drawn) for name in ("fvd", "clipsim", *_fids())}
        return {"values": _rounded(values), "draws": {name: _rounded(draw) for name, draw in draws.items()}}


def _fids() -> list[str]:
    return [f"fid.{domain}" for domain in DOMAINS]


def _rounded(values: Any) -> Any:
    """To as many digits as mean something; NaN, which JSON does not have, becomes None."""
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, np.ndarray):
        return [_rounded(float(value)) for value in values]
    return None if np.isnan(values) else float(f"{values:.{DIGITS}g}")


def described(row: Baseline) -> dict[str, Any]:
    """How a network is sampled, as plain values."""
    guidance = {str(steps): row.guidances[steps] for steps in STEPS}
    return {"sampler": row.sampler, "spacing": row.spacing, "guidance": guidance}


def measure_one(ruler: Ruler, networks: Networks, network: str) -> dict[str, Any]:
    """Step count -> what the ruler says of a network."""
    found, row = {}, BASELINES.get(network, STUDENT)
    for steps in STEPS:
        method = Method(network, network, network, row.sampler, steps, row.guidances[steps])
        found[str(steps)] = ruler.score(lambda captions, seeds, m=method: networks.sample(m, captions, seeds))
        print(f"{network}, {steps} steps: fvd {found[str(steps)]['values']['fvd']:.4g}", flush=True)
    return found


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def digest_of(protocol: dict[str, Any]) -> str:
    """By which a result says with what protocol it was measured."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def check_protocol(folder: Path, protocol: dict[str, Any]) -> None:
    """Write the protocol; ValueError if something is there that was measured by another one."""
    path, said = folder / "protocol.json", json.loads(json.dumps(protocol))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else said
    if before != said and any(file.name != path.name for file in folder.glob("*.json")):
        differ = [key for key in sorted({*said, *before}) if before.get(key) != said.get(key)]
        raise ValueError(f"{folder} was measured by another protocol ({', '.join(differ)}): name another --output.")
    write(path, said)


def search(folder: Path, batch_size: int) -> None:
    """Say which guidance is best for the teacher's samplers, for `BASELINES`; readings are kept in `folder`."""
    study = Study(Networks({"teacher": TEACHER}), folder, batch_size)
    for name, row in BASELINES.items():
        for steps in STEPS:
            method = Method(f"{name}-{steps}", name, "teacher", row.sampler, steps)
            best, shares = study.best_guidance(method, GUIDANCES, spaced(training_captions(), SEARCH_CAPTIONS))
            print(f"{name}, {steps} steps: guidance {best:g}, all right {shares}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="where ablate.py trained")
    add("--world", type=Path, required=True, help="the world it trained in")
    add("--output", type=Path, required=True, help="where the scores are written")
    add(
        "--rows",
        nargs="+",
        choices=(*BASELINES, *ROWS),
        default=(*BASELINES, *ROWS),
        metavar="ROW",
        help="of ablate.py, or teacher-ddim, teacher-dpm",
    )
    add("--seeds", nargs="+", type=int, default=SEEDS, help="seeds of the training (default: 0 1 2)")
    add("--steps", type=int, default=TRAINED_STEPS, help="of the trainings (default: %(default)s)")
    add("--videos", type=int, default=8, help="of each of the 60 captions (default: 8)")
    add("--resamples", type=int, default=100, help="of the captions (default: 100)")
    add("--batch_size", type=int, default=16, help="videos at once (default: 16)")
    add("--search", action="store_true", help="say which guidance is best for the teacher, and measure nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args, ruler = parse(arguments), None
    if args.search:
        search(args.runs / "search", args.batch_size)
        return
    for row in args.rows:
        if row in BASELINES:
            jobs = [(args.output / f"{row}.json", None)]
        else:
            finished = [run for run in runs([row], args.seeds, args.runs, args.world, args.steps) if run.finished()]
            jobs = [(args.output / f"{row}-{run.seed}.json", run) for run in finished]
            if not jobs:
                print(f"{row}: no training with these seeds is finished in {args.runs}")
        for path, run in jobs:
            record = run.record() if run else {"row": row, **described(BASELINES[row])}
            if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["run"] == record:
                continue
            if ruler is None:
                ruler = Ruler(args.videos, args.resamples, args.batch_size)
                check_protocol(args.output, ruler.protocol)
            networks = Networks({row: str(run.folder) if run else TEACHER})
            about = {"run": record, "protocol": digest_of(ruler.protocol), "versions": computed_by()}
            write(path, about | {"steps": measure_one(ruler, networks, row)})


if __name__ == "__main__":
    main()
