"""Seconds until `diffusers-mcm generate` says its first line, and until its first step, against bare imports.

    python benchmarks/start_up.py --document docs/performance.md

Each of the runs is a fresh process with the packaged model on the CPU, and they take turns, so that whatever else the
machine does slows all of them. Seconds are those of the processor, of one thread; ratios are taken within a round and
the median of the rounds is told. «First step» is the first call of the denoiser: by then everything is imported, the
weights are loaded and the prompt is encoded.

`import torch, diffusers, transformers` reads only half of what any pipeline needs, for diffusers and transformers read
the other half when a class is first asked for. The second yardstick asks for the classes of the packaged model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import read_results, write_results

from diffusers_mcm.tables import replace_section, table

TARGET = 1.3
BARE, CLASSES = "bare imports", "bare imports and the classes"
_BARE = "import torch, diffusers, transformers"
_CLASSES = f"""{_BARE}
from diffusers import AutoencoderKL, DiffusionPipeline, UNet3DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer"""
_GENERATE = """
from diffusers_mcm.cli import main
from diffusers_mcm.commands import generate

tell, load = generate.tell, generate.load_pipeline

def told(text):
    seconds.setdefault("first line", time.process_time())
    tell(text)

def loaded(*arguments):
    pipeline = load(*arguments)
    step = lambda *_: seconds.setdefault("first step", time.process_time()) and None
    pipeline.denoiser.register_forward_pre_hook(step)
    return pipeline

generate.tell, generate.load_pipeline = told, loaded
flags = "--steps 1 --device cpu --overwrite -o".split()
code = main(["generate", "a red circle moving left on a black background", *flags, sys.argv[1]])
if code:
    sys.exit(code)
"""
RUNS = {BARE: _BARE, CLASSES: _CLASSES, "generate": _GENERATE}


def seconds_of(code: str) -> dict[str, float]:
    """What a fresh process noted down while it ran the code: name -> seconds since it started; `whole` at its end."""
    after = 'seconds["whole"] = time.process_time()\nprint("\\n" + json.dumps(seconds))'
    lines = ["import json, sys, time", "seconds = {}", code, after]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "\n".join(lines), os.path.join(folder, "out.gif")]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=one_thread, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"a run failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(rounds: int) -> list[dict[str, float]]:
    """The seconds of every round; the first, which reads the files into the system's cache, is left out."""
    measured = []
    for number in range(rounds + 1):
        found = {name: seconds_of(code) for name, code in RUNS.items()}
        seconds = {name: found[name]["whole"] for name in (BARE, CLASSES)}
        seconds |= {name: found["generate"][name] for name in ("first line", "first step")}
        print(seconds, flush=True)
        if number:
            measured.append(seconds)
    return measured


def rows_of(rounds: list[dict[str, float]]) -> list[tuple[str, dict[str, str]]]:
    """Medians: the seconds of each, and their ratios to either yardstick."""
    rows = []
    for name in rounds[0]:
        cells = {"seconds": f"{statistics.median(seconds[name] for seconds in rounds):.2f}"}
        for yardstick in (BARE, CLASSES):
            ratio = statistics.median(seconds[name] / seconds[yardstick] for seconds in rounds)
            cells[f"times the {yardstick}"] = f"{ratio:.2f}"
        rows.append((name, cells))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/start_up.json"), help="results")
    parser.add_argument("--document", type=Path, help="file whose <!-- start-up --> section takes the table")
    options = parser.parse_args()
    results = read_results(options.output) | {"rounds": measure(options.rounds)}
    write_results(options.output, results)
    rows = rows_of(results["rounds"])
    text = table(rows, list(rows[0][1]))
    print(text)
    if options.document:
        replace_section(options.document, "start-up", text)
    reached = max(float(cells[f"times the {BARE}"]) for name, cells in rows if name.startswith("first"))
    print(f"against the bare imports {reached:.2f} times at most; the target is {TARGET}")
    return int(reached > TARGET)


if __name__ == "__main__":
    sys.exit(main())
