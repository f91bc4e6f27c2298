"""The list of videos to make: prompts from arguments, a file or stdin, and where each video goes."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "negative_prompt", "seed")


@dataclass(frozen=True)
class Prompt:
    """What to show, and what is particular to it; `None` leaves it to the flags."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Job:
    """One video."""

    prompt: str
    negative_prompt: str | None
    seed: int
    path: Path


def read_prompts(arguments: Sequence[str], file: str | None) -> list[Prompt]:
    """Prompts of the command line, then those of a file; `-` is stdin for either."""
    prompts = []
    for argument in arguments:
        prompts += read_list("-") if argument == "-" else [Prompt(argument)]
    if file is not None:
        prompts += read_list(file)
    if not prompts:
        raise ValueError("expected a prompt: as an argument, in a file (--prompts FILE) or from stdin (--prompts -)")
    return prompts


def read_list(file: str) -> list[Prompt]:
    """`.csv` with a header, `.jsonl` with an object a line, anything else (and stdin) with a prompt a line."""
    if file == "-" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("expected the prompts in a file: of several processes each would read a part of stdin")
    suffix = Path(file).suffix.lower()
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # `splitlines` also splits where a prompt holds U+2028 or the like
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        rows = [{key: value for key, value in row.items() if value} for row in reader]
    elif suffix in (".jsonl", ".ndjson"):
        rows = [_parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        stripped = map(str.strip, lines)
        rows = [{"prompt": line} for line in stripped if line and not line.startswith("#")]
    name = "stdin" if file == "-" else file
    prompts = [_to_prompt(row, f"{name}, prompt {number}") for number, row in enumerate(rows, 1)]
    if not prompts:
        raise ValueError(f"expected at least one prompt in {name}, got none")
    return prompts


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected a JSON object in {where}, got {line!r} ({error})") from None


def _to_prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict) or "prompt" not in row or not set(row) <= set(COLUMNS):
        raise ValueError(f"expected `prompt` and perhaps {' and '.join(COLUMNS[1:])} in {where}, got {row!r}")
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if isinstance(row.get("seed"), (bool, float)):
            raise ValueError
        seed = int(row["seed"]) if "seed" in row else None
    except (TypeError, ValueError):
        raise ValueError(f"expected a whole number as the seed in {where}, got {row['seed']!r}") from None
    texts = {key: value for key, value in row.items() if key != "seed"}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"expected a text as the {key} in {where}, got {value!r}")
    return Prompt(**texts, seed=seed)


def plan(
    prompts: Sequence[Prompt],
    output: Path,
    suffix: str | None,
    *,
    seed: int,
    negative_prompt: str | None = None,
    num_videos: int = 1,
) -> list[Job]:
    """One job for every video. Every prompt starts from `seed` or its own; its k-th video from k − 1 above that.

    So a video depends on its prompt and its seed, and never on its place in the list.
    """
    jobs = [
        (prompt, (seed if prompt.seed is None else prompt.seed) + offset, f"-{offset + 1}" if num_videos > 1 else "")
        for prompt in prompts
        for offset in range(num_videos)
    ]
    wrong = [number for _, number, _ in jobs if not 0 <= number < 2**63]
    if wrong:
        raise ValueError(f"expected seeds from 0 to 2^63 - 1, got {wrong[0]}")
    if suffix is None:
        paths = numbered(output, len(jobs))
    else:
        numbers = [number for number, _ in enumerate(prompts, 1) for _ in range(num_videos)]
        names = (f"{number:04d}-{slug(job[0].prompt)}{job[2]}{suffix}" for number, job in zip(numbers, jobs))
        paths = [output / name for name in names]
    return [
        Job(prompt.prompt, prompt.negative_prompt or negative_prompt, job_seed, path)
        for (prompt, job_seed, _), path in zip(jobs, paths)
    ]


def numbered(path: Path, count: int) -> list[Path]:
    """`out.mp4` -> [out.mp4], or [out-1.mp4, out-2.mp4, …] for several."""
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_name(f"{path.stem}-{index:0{digits}d}{path.suffix}") for index in range(1, count + 1)]


def slug(prompt: str, length: int = 40) -> str:
    """A prompt as part of a file name: letters and digits of any script, lower case, joined by dashes."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:length].strip("-") or "video"
