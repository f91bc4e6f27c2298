"""Trains what the paper's Tables 1 and 3 to 6 compare, in the world of shapes: one short recipe, three seeds.

What is beyond the paper is trained by the same recipe, where --rows asks for it.

    diffusers-mcm shapes build world
    python examples/shapes/ablate.py --world world --output work/ablate

A row that stands in several tables is trained once. Each run is a folder `ROW/seed-N` with its LoRA, its log, and
`run.json`, which says how it was made; one that was stopped goes on from its checkpoint when it is started again.
Several calls may work on one folder at the same time: a run that another one is training is passed over.
With `--cache` what is trained is the same but for the last digits, and a quarter of a step's work is done once, of all
rows but `change`, which compares with frames that no cache has.
"""

import argparse
import fcntl
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers_mcm.files import sha256, write_text
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.location import WEIGHTS_NAME

SCRIPT = Path(__file__).resolve().parents[1] / "train_mcm_distill.py"
TEACHER = "mcm-shapes-teacher"
STEPS, SEEDS = 600, (0, 1, 2)
LOSSES = ("loss", "consistency", "adversarial", "discriminator", "gradient_penalty")
LAST_STEPS = 50  # over which the final losses are averaged: a step's own says little
Flags = dict[str, Any]

# What all rows have in common, as in distil.sh. A folder of data is named as it is in the world.
RECIPE: Flags = dict(
    pretrained_teacher_model=TEACHER,
    frame_interval=1,
    train_batch_size=8,
    lora_rank=32,
    lora_alpha=32,
    scale_lr=False,
    learning_rate=2e-4,
    lr_warmup_steps=20,
    guidance_min=1,
    guidance_max=1,
    num_solver_steps=8,
    timesteps="visited",
    fuse_lora=True,
    ema_decay=0.995,
    checkpointing_steps=100,
    checkpoints_total_limit=1,
    resume_from_checkpoint="latest",
    save_dtype="fp16",
    report_to="none",
)
# distil.sh takes 0.5 until the appearance is there and 0.15 while the motion comes back; one stage has to do both.
ADVERSARY: Flags = dict(
    lambda_adv=0.3,
    discriminator_features="mcm-shapes-features",
    discriminator_text="mcm-shapes-clip",
    discriminator_augmentation=(),
    discriminator_learning_rate=2e-4,
    gradient_penalty_weight=1e-3,
    gradient_penalty_growth=1,
)
LCM: Flags = dict(video_data="videos", motion="raw", lambda_real=1, lambda_adv=0)
ADVERSARIAL: Flags = LCM | ADVERSARY
MCD = ADVERSARIAL | dict(motion="learnable")
MIXED = MCD | dict(lambda_real=0.5)
CLEAN = MIXED | dict(image_data="images/clean")
# As many pictures in a step as there are frames in 8 clips, hence at the same cost.
PICTURES: Flags = LCM | dict(num_frames=1, train_batch_size=128, lora_modules="spatial")
CLIPS: Flags = LCM | dict(lora_modules="temporal")

# Rows by name, in the order in which they are trained; each has one stage or two, which share the steps.
ROWS: dict[str, tuple[Flags, ...]] = {
    "lcm": (LCM,),
    "mixed": (MIXED,),
    "mcd": (MCD,),
    "adversarial": (ADVERSARIAL,),
    "clean": (CLEAN,),
    "two-stage-clean": (PICTURES | dict(video_data="images/clean"), CLIPS),
    "generated": (MCD | dict(lambda_real=0),),
    "diff": (MCD | dict(motion="diff"),),
    "low": (MCD | dict(motion="low"),),
    "high": (MCD | dict(motion="high"),),
    "corr": (MCD | dict(motion="corr"),),
    "cartoon": (MIXED | dict(image_data="images/cartoon"),),
    "two-stage-cartoon": (PICTURES | dict(video_data="images/cartoon"), CLIPS),
    "temporal": (CLEAN | dict(lambda_temporal=1),),
    "change": (CLEAN | dict(lambda_change=ADVERSARY["lambda_adv"]),),
}
BEYOND = ("temporal", "change")  # rows of which the paper knows nothing
PAPERS = tuple(row for row in ROWS if row not in BEYOND)
# The paper's tables by number, and a last one beyond: what a line of it is called here, and the row that it shows.
TABLES: dict[int, dict[str, str]] = {
    1: {"LCM": "lcm", "MCM, own frames": "mixed", "MCM, clean images": "clean"},
    3: {
        "two-stage, clean images": "two-stage-clean",
        "MCM, clean images": "clean",
        "two-stage, cartoon images": "two-stage-cartoon",
        "MCM, cartoon images": "cartoon",
    },
    4: {"LCM": "lcm", "+ adversarial": "adversarial", "+ MCD": "mcd", "+ mixed trajectory": "mixed"},
    5: {
        "raw latents": "adversarial",
        "difference": "diff",
        "correlation": "corr",
        "low frequency": "low",
        "high frequency": "high",
        "learnable": "mcd",
    },
    6: {"λ_real = 1": "mcd", "λ_real = 0.5": "mixed", "λ_real = 0": "generated"},
    7: {"MCM, clean images": "clean", "+ λ_temporal = 1": "temporal", "+ λ_change = λ_adv": "change"},
}


def weights_of(packaged: str) -> dict[str, str]:
    """Component -> hash of its weights; a teacher's decoder draws every video, also those of a LoRA."""
    return {file.parent.name: sha256(file) for file in sorted((PACKAGED_FOLDER / packaged).glob("*/*.safetensors"))}


def how_built(world: Path) -> dict[str, Any]:
    """What `diffusers-mcm shapes build` says of a world."""
    build = world / "build.json"
    if not build.is_file():
        raise ValueError(f"{world} is not a built world: make one with diffusers-mcm shapes build {world}.")
    return json.loads(build.read_text())


@dataclass(frozen=True)
class Run:
    """One row, trained with one seed."""

    row: str
    seed: int
    output: Path
    world: Path
    steps: int = STEPS
    cache: Path | None = None  # where what is encoded of the world is kept for all runs

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the LoRA is, as `MCMPipeline.from_pretrained` reads it, and `run.json` beside it."""
        return self.output / self.row / f"seed-{self.seed}"

    @property
    def stages(self) -> list[Flags]:
        """What is trained one after the other: the flags of the training that decide it, without paths."""
        stages = ROWS[self.row]
        length = self.steps // len(stages)
        return [RECIPE | stage | dict(seed=self.seed, max_train_steps=length) for stage in stages]

    def stage_folder(self, number: int) -> Path:
        """Where a stage is trained; the last one is in the run's own folder."""
        return self.folder if number == len(self.stages) - 1 else self.folder / f"stage-{number + 1}"

    def cached(self, number: int) -> Flags:
        """The flags by which a stage reads what was encoded before, in a folder for each seed; none without a cache.

        Of a video there are as many clips as the training has epochs, so that each sees judged frames of its own.
        A judge of changes compares with frames that no cache has.
        """
        stage = self.stages[number]
        if self.cache is None or "lambda_change" in stage:
            return {}
        epochs = math.ceil(self.steps * stage["train_batch_size"] / how_built(self.world)["num_videos"])
        folder = self.cache / f"seed-{self.seed}" / stage["video_data"]
        return dict(cache_latents=folder, windows_per_clip=1 if stage.get("num_frames") == 1 else epochs)

    def how_made(self) -> dict[str, Any]:
        """What decides the LoRA, as `run.json` says it."""
        made = dict(row=self.row, seed=self.seed, stages=self.stages, world=how_built(self.world))
        return json.loads(json.dumps(made))  # as it is read again: a tuple is a list there

    def record(self) -> dict[str, Any] | None:
        """What `run.json` says; None if the run was never begun. ValueError if it was begun with other settings."""
        file = self.folder / "run.json"
        if not file.is_file():
            return None
        record, made = json.loads(file.read_text(encoding="utf-8")), self.how_made()
        changed = [name for name in made if record.get(name) != made[name]]
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other settings ({', '.join(changed)}) than are asked for: give those"
                " it was begun with (--steps, --world), or name another folder."
            )
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def finished(self) -> bool:
        """Whether the LoRA is there."""
        return "sha256" in (self.record() or {})

    def log(self) -> list[dict[str, Any]]:
        """The lines of the training's log, all stages one after the other."""
        files = [self.stage_folder(number) / "train_log.jsonl" for number in range(len(self.stages))]
        return [json.loads(line) for file in files if file.is_file() for line in file.open(encoding="utf-8")]


def runs(
    rows: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    world: Path,
    steps: int = STEPS,
    cache: Path | None = None,
) -> list[Run]:
    """The runs in the order in which they are trained: all rows with one seed, then with the next."""
    return [Run(row, seed, output, world, steps, cache) for seed in seeds for row in ROWS if row in rows]


def words(flags: Flags) -> list[str]:
    """Flags as the training script reads them."""
    line = []
    for name, value in flags.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no_{name}")
        else:
            line += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return line


def command(run: Run, number: int) -> list[str]:
    """The command line of one stage of a run."""
    flags = run.stages[number] | run.cached(number)
    flags |= {name: run.world / flags[name] for name in ("video_data", "image_data") if name in flags}
    flags["output_dir"] = run.stage_folder(number)
    if number:
        flags["pretrained_lora"] = run.stage_folder(number - 1)
    return [sys.executable, str(SCRIPT), *words(flags)]


def encoding(run: Run, number: int) -> list[str]:
    """The command line that encodes what a stage reads, of videos the frames that an adversary judges too."""
    flags = run.stages[number] | run.cached(number)
    if flags.get("num_frames") != 1:
        flags = {name: value for name, value in (flags | ADVERSARY).items() if name != "image_data"}
    flags["video_data"] = run.world / flags["video_data"]
    return [sys.executable, "-m", "diffusers_mcm", "encode", *words(flags)]


@contextmanager
def alone(run: Run) -> Iterator[int | None]:
    """A lock on a run's folder, which its training is handed; None if another process has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield lock.fileno()


@contextmanager
def one_at_a_time(cache: Path) -> Iterator[None]:
    """Wait until nobody else encodes into a cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train(run: Run, lock: int) -> None:
    """Train what is missing of a run; CalledProcessError if that fails, with the reason in its `output.txt`.

    The training holds the lock as well: if this process is killed and that one is not, nobody begins beside it.
    """
    record = run.record() or run.how_made()
    run.write(record)
    for number in range(len(run.stages)):
        if not (run.stage_folder(number) / WEIGHTS_NAME).is_file():  # which is written last
            with (run.folder / "output.txt").open("a") as output:
                options: dict[str, Any] = dict(check=True, stdout=output, stderr=subprocess.STDOUT)
                if run.cache is not None and run.cached(number):
                    with one_at_a_time(run.cache):
                        subprocess.run(encoding(run, number), **options)
                subprocess.run(command(run, number), pass_fds=(lock,), **options)
    run.write(record | results(run))
    for checkpoint in run.folder.glob("**/checkpoint-*"):
        shutil.rmtree(checkpoint)


def results(run: Run) -> dict[str, Any]:
    """What there is to say of a run when its training is done."""
    log = run.log()
    last = log[-LAST_STEPS:]
    losses = {name: sum(row[name] for row in last) / len(last) for name in LOSSES if name in last[-1]}
    ends = [row for row in log if row["step"] == run.stages[0]["max_train_steps"]]
    return dict(
        steps=len(log),
        seconds=round(sum(row["seconds"] for row in ends), 1),
        losses=losses,
        sha256=sha256(run.folder / WEIGHTS_NAME),
        cached=bool(run.cached(0)),
        versions={name: version(name) for name in ("torch", "diffusers", "peft")},
    )


def train_one(run: Run, deadline: float) -> bool:
    """Train a run if it is missing and there is time left; False if it failed."""
    if time.monotonic() > deadline:
        return True
    with alone(run) as lock:
        if lock is None or run.finished():
            return True
        print(f"{time.strftime('%F %T')} {run}: begun", flush=True)
        try:
            train(run, lock)
        except subprocess.CalledProcessError as error:
            print(f"{run}: failed with status {error.returncode}, see {run.folder / 'output.txt'}", flush=True)
            return False
    print(f"{time.strftime('%F %T')} {told(run)}", flush=True)
    return True


def told(run: Run) -> str:
    """A line on how far a run is."""
    record = run.record()
    if record is None:
        return f"{run}: missing"
    if not run.finished():
        return f"{run}: {len(run.log())} of {run.steps} steps"
    losses = ", ".join(f"{name} {value:.4g}" for name, value in record["losses"].items())
    return f"{run}: {record['steps']} steps in {record['seconds'] / 60:.0f} minutes, {losses}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--world", type=Path, required=True, help="what `diffusers-mcm shapes build` made")
    add("--output", type=Path, required=True, help="where the runs are")
    add(
        "--rows",
        nargs="+",
        choices=tuple(ROWS),
        default=PAPERS,
        metavar="ROW",
        help=f"of {', '.join(ROWS)} (default: the paper's)",
    )
    add("--seeds", nargs="+", type=int, default=SEEDS, help="seeds of the training (default: 0 1 2)")
    add("--steps", type=int, default=STEPS, help="of each run, its stages together (default: %(default)s)")
    add("--cache", type=Path, help="keep in this folder what is encoded once for all runs of a seed, but `change`")
    add("--processes", type=int, choices=(1, 2), default=1, help="how many runs are trained side by side")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    add("--list", action="store_true", help="say what is there and what is missing, and train nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    cache = None if args.cache is None else args.cache.resolve()
    wanted = runs(args.rows, args.seeds, args.output.resolve(), args.world.resolve(), args.steps, cache)
    if args.list:
        print("\n".join(told(run) for run in wanted))
        return
    for run in wanted:
        run.record()  # what was begun otherwise is told before hours have passed
    deadline = time.monotonic() + 60 * args.minutes
    with ThreadPoolExecutor(args.processes) as pool:
        try:
            done = list(pool.map(lambda run: train_one(run, deadline), wanted))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if not all(done):
        raise SystemExit(f"{done.count(False)} of {len(done)} runs failed.")


if __name__ == "__main__":
    main()
