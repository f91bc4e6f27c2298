"""Measures how steady a LoRA of the shapes world is, against every target of the project but speed and plain LCM.

With the few captions of its defaults it takes a few minutes and tells two trainings apart roughly; the figures of the
project are --captions 60 --seeds 4. What was sampled once is kept in --output, which serves any number of LoRAs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusers_mcm.files import write_text
from diffusers_mcm.shapes.captions import held_out_captions, spaced
from diffusers_mcm.shapes.figures import Study
from diffusers_mcm.shapes.methods import MCM_METHODS, TEACHER_METHODS, Networks
from diffusers_mcm.shapes.scores import METRICS, estimates, interval, outcomes, resampled_captions
from diffusers_mcm.shapes.targets import Check, checks
from diffusers_mcm.tables import table

SHOWN = ("all_right", "shape", "identity_kept", "wobble", "flicker", "sharpness", "displacement", "spread")
Draws = Mapping[str, Mapping[str, np.ndarray]]  # method -> metric -> what `estimates` gives


def measure(networks: Networks, folder: Path, num_captions: int, num_seeds: int) -> Draws:
    """Every method's metrics on so many of the held-out captions, each with its resamples."""
    captions, seeds = spaced(held_out_captions(), num_captions), range(num_seeds)
    study, rows = Study(networks, folder), resampled_captions(num_captions)
    readings = {method.name: study.readings(method, captions, seeds) for method in (*TEACHER_METHODS, *MCM_METHODS)}
    readings["truth-clean"] = study.truth("truth-clean", captions, seeds)
    return {
        name: {metric: estimates(values, rows) for metric, values in outcomes(found, captions).items()}
        for name, found in readings.items()
    }


def reached(draws: Draws) -> list[Check]:
    """The targets of which something was measured."""
    found = checks(lambda name, metric: draws[name][metric], {}, with_lcm=False)
    return [check for check in found if check.reached is not None]


def plain(values: np.ndarray) -> list[float | None]:
    """(estimate, lower, upper) for a JSON file."""
    return [None if np.isnan(value) else round(value, 6) for value in interval(values)]


def report(draws: Draws) -> str:
    """The table of the methods and that of the targets, in markdown."""
    methods = []
    for name, metrics in draws.items():
        cells = {METRICS[metric].title: METRICS[metric].format(interval(metrics[metric])[0]) for metric in SHOWN}
        methods.append((name, cells))
    words = {True: "yes", False: "**no**"}
    targets = [(check.name, check._asdict() | {"reached": words[bool(check.reached)]}) for check in reached(draws)]
    titles = [METRICS[metric].title for metric in SHOWN]
    return f"{table(methods, titles)}\n\n{table(targets, ['target', 'measured', 'reached'])}\n"


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("lora", help="LoRA to measure: packaged name, folder or Hub repository")
    p.add_argument(
        "--output", type=Path, default=Path("steady"), help="folder for the readings and NAME.json, NAME.md"
    )
    p.add_argument("--name", help="what the two are called (default: the LoRA's last name)")
    p.add_argument("--teacher", default="mcm-shapes-teacher", help="packaged name, folder or Hub repository")
    p.add_argument("--vae", type=Path, help="folder of an autoencoder to decode with, the teacher's videos as well")
    p.add_argument("--captions", type=int, default=24, help="how many of the held-out captions, evenly spaced")
    p.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, … per caption; the spread takes two or more")
    args = p.parse_args(argv)
    networks = Networks({"teacher": args.teacher, "mcm": args.lora})
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
        for network in networks.sources:
            networks.pipeline(network).register_modules(vae=vae)
    draws = measure(networks, args.output / "readings", args.captions, args.seeds)
    name = f"{args.name or Path(args.lora).name}-{args.captions}x{args.seeds}"
    found = {
        "lora": args.lora,
        "vae": str(args.vae) if args.vae else None,
        "methods": {method: {metric: plain(x) for metric, x in metrics.items()} for method, metrics in draws.items()},
        "checks": [check._asdict() for check in reached(draws)],
    }
    text = report(draws)
    write_text(args.output / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(args.output / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
