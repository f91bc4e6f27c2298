"""Measures the miniature Wan on the held-out captions: teacher, undistilled, MCM and the plain LCM beside it.

    python examples/shapes/measure_wan.py --teacher T --mcm M --lcm L --output work/measured --scores scores.json

What was sampled stays, and an --mcm or --lcm that is not there yet is left out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scoring import FlowNetworks, add_scores

from diffusers_mcm.location import WEIGHTS_NAME
from diffusers_mcm.scheduler import MCMFlowScheduler
from diffusers_mcm.shapes.figures import Study
from diffusers_mcm.shapes.methods import Method

EULER_SHIFT = 3.0  # of the teacher's own sampling


def methods(network: str, label: str, steps: Sequence[int]) -> list[Method]:
    return [Method(f"{network}-{n}", f"{label}, {n} step{'s'[: n > 1]}", network, "mcm", n) for n in steps]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="the miniature Wan")
    add("--mcm", type=Path, help="its motion consistency LoRA")
    add("--lcm", type=Path, help="the control: its plain consistency LoRA")
    add("--output", type=Path, required=True, help="where what was read is kept")
    add("--scores", type=Path, required=True, help="JSON file of the scores")
    add("--seeds", type=int, default=4, help="videos of each caption (default: %(default)s)")
    add("--guidance", type=float, default=2.0, help="of the teacher (default: %(default)s)")
    add("--training_captions", type=int, help="measure on so many of the training captions, to choose by")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    wanted = [
        Method("teacher-48", "teacher, Euler, 48 steps", "euler", "mcm", 48, args.guidance),
        Method("teacher-4", "teacher, Euler, 4 steps", "euler", "mcm", 4, args.guidance),
        *methods("undistilled", "teacher undistilled, no guidance", (1, 4)),
    ]
    sources = {"euler": args.teacher, "undistilled": args.teacher}
    for name, steps in (("mcm", (1, 2, 4, 8)), ("lcm", (1, 2, 4))):
        folder = getattr(args, name)
        if folder and (folder / WEIGHTS_NAME).is_file():
            sources[name] = folder
            wanted += methods(name, name.upper(), steps)
    samplers = {"euler": MCMFlowScheduler(shift=EULER_SHIFT, stochastic=False), "undistilled": MCMFlowScheduler()}
    study = Study(FlowNetworks(sources, samplers), args.output)
    add_scores(args.scores, {name: getattr(args, name) for name in ("seeds", "training_captions")}, study, wanted)


if __name__ == "__main__":
    main()
