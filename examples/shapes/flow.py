"""Distils the flow teacher with three weights of the adversarial loss, and measures what becomes of looks and motion.

    python examples/shapes/flow.py --world world --output work/flow --scores examples/shapes/flow.json

One short recipe, that of ablate.py, with a real clip in nine samples of ten and clean images, and the weight alone
changed. What was trained or measured stays, and a training that was stopped goes on from its checkpoint. Beside the
LoRAs stand the teacher on its own path (DDIM) and on the straight one (Euler), and the flow teacher undistilled, in
the sampler of the LoRAs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ablate import ADVERSARY, RECIPE, words
from flow_teacher import write_repository

from diffusers_mcm import MCMPipeline, make_scheduler
from diffusers_mcm.files import write_text
from diffusers_mcm.location import WEIGHTS_NAME
from diffusers_mcm.scheduler import MCMFlowScheduler
from diffusers_mcm.shapes.captions import Caption, held_out_captions, spaced, training_captions
from diffusers_mcm.shapes.scores import METRICS, estimates, interval, outcomes, read, resampled_captions
from diffusers_mcm.video_io import to_uint8

WEIGHTS = (0.05, 0.15, 0.5)  # of the adversarial loss
STEPS = 600
SHIFT = 3.0
DISTIL = Path(__file__).resolve().parent / "distil_flow.py"


class Sampled(NamedTuple):
    """A line of the table: what is sampled, and how."""

    model: str  # "teacher", "flow", or the weight of a LoRA
    sampler: str  # "ddim", "euler" or "mcm"
    steps: int
    guidance: float = 1.0

    def __str__(self) -> str:
        return f"{self.model}-{self.sampler}-{self.steps}"


BASELINES = (
    Sampled("teacher", "ddim", 4, 1.5),  # the guidance of the packaged figures
    Sampled("flow", "euler", 4, 1.5),
    Sampled("flow", "mcm", 1),
    Sampled("flow", "mcm", 4),
    Sampled("teacher", "ddim", 50, 2.0),
    Sampled("flow", "euler", 48, 2.0),
)
DISTILLED = tuple(Sampled(str(weight), "mcm", steps) for weight in WEIGHTS for steps in (1, 2, 4))


def train(weight: float, args: argparse.Namespace) -> None:
    """Distil the flow teacher into a LoRA, unless there is one already."""
    folder = args.output / f"adv-{weight}"
    flags = RECIPE | ADVERSARY | dict(lambda_adv=weight, lambda_real=0.9, motion="learnable", shift=args.shift)
    flags |= dict(pretrained_teacher_model=args.output / "teacher", video_data=args.world / "videos", seed=args.seed)
    flags |= dict(image_data=args.world / "images" / "clean", output_dir=folder, max_train_steps=args.steps)
    if not (folder / WEIGHTS_NAME).is_file():
        subprocess.run([sys.executable, str(DISTIL), *words(flags)], check=True)


def pipeline_of(line: Sampled, output: Path, shift: float) -> MCMPipeline:
    """What a line samples, with its sampler."""
    source = {"teacher": "mcm-shapes-teacher", "flow": output / "teacher"}.get(
        line.model, output / f"adv-{line.model}"
    )
    pipeline = MCMPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.get_active_adapters():
        pipeline.fuse_lora()
    if line.sampler == "ddim":
        pipeline.scheduler = make_scheduler("ddim", pipeline)
    elif line.model == "flow":
        pipeline.scheduler = MCMFlowScheduler(shift=shift, stochastic=line.sampler == "mcm")
    return pipeline


def sample(pipeline: MCMPipeline, line: Sampled, captions: Sequence[Caption], seeds: Sequence[int]) -> np.ndarray:
    """One video per caption and seed: uint8 (N, T, H, W, 3)."""
    videos = pipeline(
        [str(caption) for caption in captions],
        num_inference_steps=line.steps,
        guidance_scale=line.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).frames
    return np.stack([to_uint8(video) for video in videos])


def score(make: Callable[[Sequence[Caption], Sequence[int]], np.ndarray], captions, seeds: int) -> dict[str, Any]:
    """Every metric of the oracle, with its 95 % interval over captions."""
    readings = []
    for caption in captions:
        readings.append([read(video) for video in make([caption] * seeds, range(seeds))])
    found, rows = outcomes(readings, captions), resampled_captions(len(captions))
    values = {name: [round(x, 4) for x in interval(estimates(found[name], rows))] for name in METRICS}
    return {name: [None if np.isnan(x) else x for x in value] for name, value in values.items()}


def measure(lines: Sequence[Sampled], args: argparse.Namespace) -> None:
    """Score the lines that are not in the file yet, and write it after each."""
    captions = held_out_captions()
    if args.training_captions:
        captions = spaced(training_captions(), args.training_captions)
    protocol = {"captions": len(captions), "held_out": not args.training_captions, "seeds": args.seeds}
    protocol |= {"shift": args.shift, "train_steps": args.steps}
    record = json.loads(args.scores.read_text()) if args.scores.is_file() else {"protocol": protocol, "lines": {}}
    if record["protocol"] != protocol:
        raise ValueError(
            f"{args.scores} was measured by another protocol, {record['protocol']}, not {protocol}: name another file."
        )
    for line in lines:
        if str(line) not in record["lines"]:
            pipeline = pipeline_of(line, args.output, args.shift)
            found = score(lambda c, s, p=pipeline, x=line: sample(p, x, c, s), captions, args.seeds)
            record["lines"][str(line)] = {"guidance": line.guidance, "scores": found}
            write_text(args.scores, json.dumps(record, indent=1) + "\n")
            print(told(line, found), flush=True)


def told(line: Sampled, found: Mapping[str, Any]) -> str:
    shown = ("all_right", "shape", "motion", "watermark_seen", "displacement", "sharpness", "flicker")
    return f"{line}: " + ", ".join(f"{name} {found[name][0]}" for name in shown)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="where the flow teacher and the LoRAs are")
    add("--scores", type=Path, required=True, help="JSON file that the scores are added to")
    add("--world", type=Path, help="what `diffusers-mcm shapes build` made; without it nothing is trained")
    add("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the trainings")
    add("--seeds", type=int, default=4, help="videos of each caption (default: %(default)s)")
    add("--shift", type=float, default=SHIFT, help="of the students' grid, and of Euler's (default: %(default)s)")
    add("--training_captions", type=int, help="measure on so many of the training captions, to choose by")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if not (args.output / "teacher").exists():
        write_repository(args.output / "teacher")
    measure(BASELINES, args)
    for weight in WEIGHTS if args.world else ():
        train(weight, args)
        measure([line for line in DISTILLED if line.model == str(weight)], args)


if __name__ == "__main__":
    main()
