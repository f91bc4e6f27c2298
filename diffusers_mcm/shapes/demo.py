"""Samples held-out prompts with the teacher and with MCM from the same seeds, and shows both side by side."""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import check_takes_files, write_text
from ..tables import replace_section, table
from ..video_io import comparison, write_image, write_mp4
from .captions import Caption, held_out_captions, spaced
from .methods import MCM_METHODS, TEACHER_METHODS, Method, Networks, machine
from .scores import METRICS, outcomes, read

FPS = 8
SHOWN = 3  # prompts in the picture
COLUMNS = ("all_right", "colour", "shape", "motion", "background", "watermark_seen", "sharpness")


def sample_all(
    networks: Networks, methods: Sequence[Method], prompts: Sequence[Caption], seed: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Per method the videos uint8 (T, H, W, 3) of all prompts, and the median seconds of one.

    Each prompt has a noise of its own, from `seed` on, and the same one for every method. The methods take turns, so
    that other load on the machine falls on all.
    """
    videos: dict[str, list[np.ndarray]] = {method.name: [] for method in methods}
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    batches = [([prompt], [seed + index]) for index, prompt in enumerate(prompts)]
    for method, (video,), spent in networks.timed_in_turns(methods, batches):
        videos[method.name].append(video)
        seconds[method.name].append(spent)
        if method is methods[-1]:
            print(f"{len(videos[method.name])} of {len(prompts)} prompts", flush=True)
    return videos, {name: statistics.median(values) for name, values in seconds.items()}


def score(videos: Sequence[np.ndarray], prompts: Sequence[Caption]) -> dict[str, float]:
    """The oracle's mean scores of one method."""
    found = outcomes([[read(video)] for video in videos], prompts)
    return {name: float(np.nanmean(found[name])) for name in COLUMNS if not np.isnan(found[name]).all()}


def write_videos(folder: Path, videos: dict[str, list[np.ndarray]], prompts: Sequence[Caption]) -> None:
    """One mp4 per method and prompt."""
    for name, of_method in videos.items():
        for index, (video, prompt) in enumerate(zip(of_method, prompts), start=1):
            write_mp4(folder / name / f"{index:02d}-{str(prompt).replace(' ', '-')}.mp4", video, fps=FPS)


def tabulate(methods: Sequence[Method], scores: dict[str, dict[str, float]], seconds: dict[str, float]) -> str:
    """Scores and seconds of every method in markdown."""
    rows = []
    for method in methods:
        cells = {METRICS[name].title: METRICS[name].format(value) for name, value in scores[method.name].items()}
        rows.append((method.label, cells | {"seconds": f"{seconds[method.name]:.2f}"}))
    return table(rows, [*(METRICS[name].title for name in COLUMNS), "seconds"])


def build_parser() -> argparse.ArgumentParser:
    """The flags of `diffusers-mcm shapes demo`."""
    parser = argparse.ArgumentParser(prog="diffusers-mcm shapes demo", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo"), help="folder for videos, picture and table")
    add("--prompts", type=int, default=12, help="how many of the held-out captions")
    add("--seed", type=int, default=0, help="of the first prompt, the next has the next; every method has the same")
    add("--teacher", default="mcm-shapes-teacher", help="base model: packaged, folder or Hub id")
    add("--mcm", default="mcm-shapes", help="MCM LoRA: packaged, folder or Hub id")
    add("--device", default=None, help="cpu, cuda … (default: the best there is)")
    add("--readme", type=Path, help="file whose <!-- demo --> section takes the table and docs/demo.png beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`diffusers-mcm shapes demo`."""
    from ..devices import choose_device

    arguments = build_parser().parse_args(argv)
    captions = held_out_captions()
    if not 1 <= arguments.prompts <= len(captions):
        raise ValueError(f"expected --prompts between 1 and {len(captions)}, got {arguments.prompts}")
    check_takes_files(arguments.output, "--output")
    prompts = spaced(captions, arguments.prompts)
    device = choose_device(arguments.device)
    methods = [*TEACHER_METHODS, *MCM_METHODS]
    networks = Networks({"teacher": arguments.teacher, "mcm": arguments.mcm}, device)
    videos, seconds = sample_all(networks, methods, prompts, arguments.seed)
    scores = {method.name: score(videos[method.name], prompts) for method in methods}

    text = tabulate(methods, scores, seconds)
    note = (
        f"{len(prompts)} held-out prompts, seeds {arguments.seed} to {arguments.seed + len(prompts) - 1}; seconds per "
        f"video, one at a time, on {machine(device)}."
    )
    picture = comparison(
        {f"{method.label} · {seconds[method.name]:.2f} s": videos[method.name][:SHOWN] for method in methods},
        [str(prompt) for prompt in prompts[:SHOWN]],
    )

    output = arguments.output
    write_videos(output, videos, prompts)
    write_image(output / "comparison.png", picture)
    results = {
        "prompts": [str(prompt) for prompt in prompts],
        "seed": arguments.seed,
        "machine": machine(device),
        "methods": {m.name: m._asdict() | scores[m.name] | {"seconds": seconds[m.name]} for m in methods},
    }
    write_text(output / "table.md", f"{note}\n\n{text}\n")
    write_text(output / "table.json", json.dumps(results, indent=2) + "\n")
    if arguments.readme:
        write_image(arguments.readme.parent / "docs" / "demo.png", picture)
        image = "![The same prompts and seeds, teacher and MCM](docs/demo.png)"
        replace_section(arguments.readme, "demo", f"{image}\n\n{note}\n\n{text}")

    print(f"\n{note}\n\n{text}\n")
    print(f"Videos:  {output}/<method>/*.mp4")
    print(f"Picture: {output / 'comparison.png'}")
    print(f"Table:   {output / 'table.md'} and table.json")
    # `make demo` installs the command where the shell does not look for it
    command = "diffusers-mcm" if shutil.which("diffusers-mcm") else Path(sys.executable).with_name("diffusers-mcm")
    print(f'Your own: {command} generate "a red circle moving left on a black background" -o out.mp4')
