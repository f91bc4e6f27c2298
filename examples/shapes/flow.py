"""Distils the flow teacher with three weights of the adversarial loss, and measures what becomes of looks and motion.

    python examples/shapes/flow.py --world world --output work/flow --scores examples/shapes/flow.json [--full]

With --full the recipe of the packaged LoRA, distil.sh, comes first. For the weights it is one short recipe, that of
ablate.py, with a real clip in nine samples of ten and clean images, and the weight alone changed. What was trained or
sampled stays, and a training that was stopped goes on from its checkpoint. Beside the LoRAs stand the teacher on its
own path (DDIM) and on the straight one (Euler), and the flow teacher undistilled, in the sampler of the LoRAs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ablate import ADVERSARY, RECIPE, Flags, words
from flow_teacher import write_repository
from scoring import FlowNetworks, add_scores

from diffusers_mcm.consistency import FLOW_SHIFT
from diffusers_mcm.files import write_text
from diffusers_mcm.location import WEIGHTS_NAME
from diffusers_mcm.scheduler import MCMFlowScheduler
from diffusers_mcm.shapes.figures import Study
from diffusers_mcm.shapes.methods import TEACHER_METHODS, Method

WEIGHTS = (0.05, 0.15, 0.5)  # of the adversarial loss
STEPS = 600
SHIFT = FLOW_SHIFT  # of 60 training captions Euler 4 had 82 % all right, with a shift of 3 78, DDIM 80 (guidance 1.5)
DISTIL = Path(__file__).resolve().parent / "distil_flow.py"
FULL = (1, 2, 4, 8)  # steps at which the LoRA of the full recipe is measured
DDIM = {method.steps: method for method in TEACHER_METHODS if method.sampler == "ddim"}
# guidance of the teacher as in the packaged figures
BASELINES = (
    DDIM[4],
    Method("flow-euler-4", "flow teacher, Euler, 4 steps", "euler", "mcm", 4, DDIM[4].guidance),
    Method("flow-1", "flow teacher undistilled, 1 step", "flow", "mcm", 1),
    Method("flow-4", "flow teacher undistilled, 4 steps", "flow", "mcm", 4),
    DDIM[50],
    Method("flow-euler-48", "flow teacher, Euler, 48 steps", "euler", "mcm", 48, DDIM[50].guidance),
)


def distilled(network: str, label: str, few: Sequence[int] = (1, 2, 4)) -> list[Method]:
    """What is measured of a LoRA: `few` steps each."""
    return [Method(f"{network}-{n}", f"{label}, {n} step{'s'[: n > 1]}", network, "mcm", n) for n in few]


def check_settings(args: argparse.Namespace) -> None:
    """ValueError if what lies in the output was trained with other settings; else they are written down there."""
    file, settings = args.output / "settings.json", {name: getattr(args, name) for name in ("shift", "steps", "seed")}
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise ValueError(
            f"expected what {args.output} was trained with, {before}, got {settings}: name another folder"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings) + "\n")


def encoded_once(args: argparse.Namespace) -> Flags:
    """The flags by which all trainings read the videos from one cache; of a video of 16 frames there is one clip."""
    return dict(cache_latents=args.output / "cache", windows_per_clip=1)


def train(weight: float, args: argparse.Namespace) -> None:
    """Distil the flow teacher into a LoRA, unless there is one already."""
    folder = args.output / f"adv-{weight}"
    flags = RECIPE | ADVERSARY | dict(lambda_adv=weight, lambda_real=0.9, motion="learnable", shift=args.shift)
    flags |= dict(pretrained_teacher_model=args.output / "teacher", video_data=args.world / "videos", seed=args.seed)
    flags |= dict(image_data=args.world / "images" / "clean", output_dir=folder, max_train_steps=args.steps)
    flags |= encoded_once(args)
    if not (folder / WEIGHTS_NAME).is_file():
        subprocess.run([sys.executable, str(DISTIL), *words(flags)], check=True)


def train_in_full(args: argparse.Namespace) -> None:
    """Distil the flow teacher as the packaged LoRA was, in both stages; what is there stays."""
    folder = args.output / "full"
    if not (folder / WEIGHTS_NAME).is_file():
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of torchrun
        environment = os.environ | {"TEACHER": str(args.output / "teacher"), "SCRIPT": str(DISTIL), "PATH": paths}
        flags = words(dict(shift=args.shift, seed=args.seed, report_to="none") | encoded_once(args))
        command = ["sh", str(DISTIL.parent / "distil.sh"), "mcm", str(args.world), str(folder), *flags]
        subprocess.run(command, env=environment, check=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="where the flow teacher, the LoRAs and what was read are")
    add("--scores", type=Path, required=True, help="JSON file of the scores")
    add("--world", type=Path, help="what `diffusers-mcm shapes build` made; without it nothing is trained")
    add("--full", action="store_true", help="train and measure the recipe of the packaged LoRA as well, first")
    add("--steps", type=int, default=STEPS, help="of each training of a weight (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the trainings")
    add("--seeds", type=int, default=4, help="videos of each caption (default: %(default)s)")
    add("--shift", type=float, default=SHIFT, help="of the students' grid, and of Euler's (default: %(default)s)")
    add("--training_captions", type=int, help="measure on so many of the training captions, to choose by")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    check_settings(args)
    if not (args.output / "teacher").exists():
        write_repository(args.output / "teacher")
    sources = {"teacher": "mcm-shapes-teacher", "flow": args.output / "teacher", "euler": args.output / "teacher"}
    sources |= {name: args.output / name for name in ("full", *(f"adv-{weight}" for weight in WEIGHTS))}
    samplers = {
        "flow": MCMFlowScheduler(shift=args.shift),
        "euler": MCMFlowScheduler(shift=args.shift, stochastic=False),
    }
    study = Study(FlowNetworks(sources, samplers), args.output / "readings")
    protocol = {name: getattr(args, name) for name in ("seeds", "training_captions", "shift", "steps", "seed")}
    add_scores(args.scores, protocol, study, BASELINES)
    if args.full and args.world:
        train_in_full(args)
        add_scores(args.scores, protocol, study, distilled("full", "MCM, full recipe", FULL))
    for weight in WEIGHTS if args.world else ():
        train(weight, args)
        add_scores(args.scores, protocol, study, distilled(f"adv-{weight}", f"MCM, λ_adv {weight}"))


if __name__ == "__main__":
    main()
