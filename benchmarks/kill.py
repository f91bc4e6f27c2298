"""Kills a run at random moments and goes on with it, until what comes out is compared with a run that was left alone.

    python benchmarks/kill.py --kills 200 --output benchmarks/kill.json

The run is one of a tiny world, of two processes over Gloo with data workers and accumulation, with a cache of what the
networks that do not train make of the data, and with a checkpoint at each step. At a moment drawn from as long as a
whole run takes, SIGKILL meets everything (as when a machine loses its power), the main process, the other one, or a
data worker; in the last three cases those that are left must end by themselves within 30 s. Then the run goes on from
`latest`. When it comes to its end, the LoRA, the motion head and all that is in the last checkpoint must be those of
the undisturbed run, bit for bit.

What was found is written after each kill; called again, the script goes on up to `--kills`. The processes are forked
from one that has imported the libraries, so that a start takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch
from results import machine, read_results, write_results
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffusers_mcm.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402
from diffusers_mcm.training.config import TrainingConfig  # noqa: E402
from diffusers_mcm.training.loop import train  # noqa: E402
from tests.training.world import flatten, make_world, tiny_config  # noqa: E402

PROCESSES, LIMIT, CACHE = 2, 30.0, ".cache"
FILES = ("pytorch_lora_weights.safetensors", "motion_head.safetensors")
VICTIMS = ("everything", "everything", "the main process", "the other process", "a data worker")


def run_config(world: dict[str, str], folder: Path) -> TrainingConfig:
    """The run, with a cache of its own that it fills first; `latest` starts anew where there is nothing."""
    options = dict(
        train_batch_size=1,
        gradient_accumulation_steps=2,
        max_train_steps=5,
        dataloader_num_workers=1,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        ema_decay=0.5,
        resume_from_checkpoint="latest",
        cache_latents=str(folder.with_suffix(CACHE)),
    )
    return tiny_config(world, folder, **options)


def start(config: TrainingConfig, log: Path) -> list[int]:
    """Fork the processes of a run, all in the group of the first; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes: list[int] = []
    for rank in range(PROCESSES):
        process = os.fork()
        if process == 0:
            _train(config, log, rank, port)
        processes.append(process)
        os.setpgid(process, processes[0])
    return processes


def _train(config: TrainingConfig, log: Path, rank: int, port: str) -> None:
    code = 1
    try:
        with log.open("ab", buffering=0) as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        train(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(processes: list[int], seconds: float) -> dict[int, int]:
    """The exit codes of those that end within so many seconds."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(processes) and time.monotonic() < end:
        for process in processes:
            if process not in codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return codes


def workers_of(processes: list[int]) -> list[int]:
    """The data workers of these processes."""
    found = []
    for process in processes:
        for thread in Path(f"/proc/{process}/task").glob("*/children"):
            found += [int(word) for word in thread.read_text().split()]
    return found


def kill(processes: list[int], ended: Collection[int], victim: str, chance: random.Random) -> tuple[bool, float]:
    """Kill, and see all end; whether anybody was killed, and how many seconds it took those that were left.

    Of the processes those in `ended` have come to their end already, and been waited for.
    """
    group, running = processes[0], [process for process in processes if process not in ended]
    among = {
        "everything": running,
        "the main process": processes[:1],
        "the other process": processes[1:],
        "a data worker": workers_of(running),
    }[victim]
    alone, killed = [process for process in among if process not in ended], victim == "everything"
    if alone and not killed:
        with suppress(ProcessLookupError):  # a worker that ends just now
            os.kill(chance.choice(alone), signal.SIGKILL)
            killed = True
    if victim == "everything" or not killed:
        os.killpg(group, signal.SIGKILL)
    began = time.monotonic()
    codes = wait(running, LIMIT)
    seconds = time.monotonic() - began
    left = [process for process in running if process not in codes]
    if left:
        os.killpg(group, signal.SIGKILL)
        wait(left, LIMIT)
        seconds = float("inf")
    return killed, seconds


def outcome(folder: Path) -> dict[str, torch.Tensor]:
    """What a run left: the tensors of its files, and all numbers of its last checkpoint."""
    files = {f"{name}: {key}": tensor for name in FILES for key, tensor in load_file(folder / name).items()}
    return files | flatten(load_checkpoint(checkpoints(folder)[-1]))


def differences(first: dict, second: dict) -> list[str]:
    """Names of what is not the same in two outcomes, bit for bit."""
    missing = first.keys() ^ second.keys()
    return [*missing, *(name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name]))]


def undisturbed(world: dict[str, str], folder: Path) -> tuple[dict, float]:
    """The outcome of a run that is left alone, and how long it takes."""
    began = time.monotonic()
    processes = start(run_config(world, folder), folder.with_suffix(".log"))
    codes = wait(processes, 600)
    if set(codes.values()) != {0} or len(codes) < PROCESSES:
        raise RuntimeError(f"The undisturbed run failed; see {folder.with_suffix('.log')}.")
    return outcome(folder), time.monotonic() - began


def one_run(
    world: dict[str, str], folder: Path, whole: dict, seconds: float, results: dict, options: argparse.Namespace
) -> None:
    """A run that is killed until it is through, or until there were enough kills."""
    for attempt in itertools.count():  # one that met nobody is no kill, and the next moment is another
        chance = random.Random(f"{options.seed} {results['kills']} {results['runs']} {attempt}")
        processes = start(run_config(world, folder), folder.with_suffix(".log"))
        moment, victim = chance.uniform(0, seconds), chance.choice(VICTIMS)
        enough = results["kills"] >= options.kills
        codes = wait(processes, 600 if enough else moment)
        if any(codes.values()):
            raise RuntimeError(f"A run could not be gone on with; see {folder.with_suffix('.log')}.")
        if len(codes) == PROCESSES:
            results["runs"] += 1
            unlike = differences(whole, outcome(folder))
            results["bitwise"] += not unlike
            results["unlike"] += unlike[:3]
            return
        killed, took = kill(processes, codes, victim, chance)
        if killed:
            results["kills"] += 1
            results["victims"][victim] = results["victims"].get(victim, 0) + 1
            results["late"] += took > LIMIT
            results["longest end, s"] = max(results["longest end, s"], round(min(took, 9999), 2))
        write_results(options.output, results)
        print(f"{results['kills']} kills, {results['bitwise']} of {results['runs']} runs the same", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="How many kills there are to be in all.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--folder", type=Path, default=Path("kill_world"), help="Where the world and the runs are.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    empty = {"kills": 0, "runs": 0, "bitwise": 0, "late": 0, "longest end, s": 0.0, "victims": {}, "unlike": []}
    results = {"machine": machine("cpu")} | empty | read_results(options.output)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    world = make_world(options.folder / "world")
    whole, seconds = undisturbed(world, options.folder / "whole")
    print(f"A run takes {seconds:.1f} s.", flush=True)
    while results["kills"] < options.kills:
        folder = options.folder / f"run-{results['runs']}"
        one_run(world, folder, whole, seconds, results, options)
        write_results(options.output, results)
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_suffix(CACHE))
    print(f"{results['kills']} kills in {results['runs']} runs, of which {results['bitwise']} came out the same")
    return 0 if results["bitwise"] == results["runs"] and not results["late"] else 1


if __name__ == "__main__":
    sys.exit(main())
