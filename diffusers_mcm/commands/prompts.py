"""The list of videos to make: prompts from arguments, a file or stdin, and where each video goes."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from ..text_files import decode_text, find_name, read_table, read_text

COLUMNS = ("prompt", "negative_prompt", "seed")
_LONGEST_NAME = 220  # bytes; a file system takes 255, the ending and what a file is called until it is whole included
_BEGINS_AS_JSON = re.compile(r'\s*(\[\s*["{]|\{\s*")')


class Prompt(NamedTuple):
    """What to show, and what is particular to it; `None` leaves it to the flags."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


class Job(NamedTuple):
    """One video."""

    prompt: str
    negative_prompt: str | None
    seed: int
    path: Path


def read_prompts(arguments: Sequence[str], file: str | None) -> list[Prompt]:
    """Prompts of the command line, then those of a file; `-` is stdin for either."""
    lists = [read_list("-") if argument == "-" else [Prompt(argument)] for argument in arguments]
    prompts = list(chain(*lists, read_list(file) if file is not None else ()))
    if not prompts:
        raise ValueError("expected a prompt: as an argument, in a file (--prompts FILE) or from stdin (--prompts -)")
    return prompts


def read_list(file: str) -> list[Prompt]:
    """The prompts of a file, or of stdin for `-`, in any encoding of `decode_text`.

    `.csv` and `.tsv` have a header and one of the usual separators, `.json` is an array of texts or objects (or an
    object with such an array as its `prompts`), `.jsonl` has an object a line, and anything else a prompt a line,
    unless it begins as JSON does. A `ValueError` names the file, and the line or number of the prompt that is wrong.
    """
    if file == "-" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("expected the prompts in a file: of several processes each would read a part of stdin")
    name = "stdin" if file == "-" else file
    if file == "-":
        stream = getattr(sys.stdin, "buffer", None)
        text = decode_text(stream.read()).checked(name) if stream is not None else sys.stdin.read()
    else:
        text = read_text(file)
    suffix = Path(file).suffix.lower()
    rows: Iterable[Any]
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(text, name)
    elif suffix == ".json":
        rows = _json_rows(text, name)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(text, name)
    elif _BEGINS_AS_JSON.match(text):  # nobody wants its brackets drawn
        first, *others = _lines(text)
        several = first[1].startswith("{") and first[1].endswith("}") and others
        rows = (_json_lines if several else _json_rows)(text, name)
    else:
        rows = [{"prompt": line} for _, line in _lines(text) if not line.startswith("#")]
    prompts = [_to_prompt(row, f"{name}, prompt {number}") for number, row in enumerate(rows, 1)]
    if not prompts:
        raise ValueError(f"expected at least one prompt in {name}, got none")
    return prompts


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers."""
    lines = enumerate(text.split("\n"), 1)  # `splitlines` also splits where a prompt holds U+2028 or the like
    return [(number, line.strip()) for number, line in lines if line.strip()]


def _csv_rows(text: str, name: str) -> Iterator[dict[str, str]]:
    table = read_table(text, ".csv", COLUMNS)
    names = {find_name(table.columns, known): known for known in COLUMNS}
    for row in table.rows:
        if row.problem:
            raise ValueError(f"{name}, line {row.line}: {row.problem}")
        yield {names.get(key, key): value for key, value in row.values.items() if value}


def _json_lines(text: str, name: str) -> list[Any]:
    return [_parse_json(line, f"{name}, line {number}", "a JSON object") for number, line in _lines(text)]


def _json_rows(text: str, name: str) -> list[Any]:
    """An array of prompts; of texts each is a prompt."""
    content = _parse_json(text, name, "an array of prompts")
    if isinstance(content, dict):
        content = content["prompts"] if set(content) == {"prompts"} else [content]
    if not isinstance(content, list):
        raise ValueError(f"expected an array of prompts in {name}, got {content!r:.80}")
    return [{"prompt": row} if isinstance(row, str) else row for row in content]


def _parse_json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"{text[:200]!r} ({error})" if "\n" not in text.strip() else f"something else: {error}"
        raise ValueError(f"expected {what} in {where}, got {got}") from None


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
    layout: str = "plain",
) -> list[Job]:
    """One job for every video. Every prompt starts from `seed` or its own; its k-th video from k − 1 above that.

    So a video depends on its prompt and its seed, and never on its place in the list. `layout`, a key of `LAYOUTS`,
    names the videos of a folder.
    """
    if suffix is None:
        paths = numbered(output, len(prompts) * num_videos)
    else:
        names = LAYOUTS[layout]([prompt.prompt for prompt in prompts], num_videos)
        paths = [output / f"{name}{suffix}" for name in names]
    jobs: list[Job] = []
    for (prompt, video), path in zip(product(prompts, range(num_videos)), paths):
        own = (seed if prompt.seed is None else prompt.seed) + video
        if not 0 <= own < 2**63:
            raise ValueError(f"expected seeds from 0 to 2^63 - 1, got {own}")
        jobs.append(Job(prompt.prompt, prompt.negative_prompt or negative_prompt, own, path))
    return jobs


def plain_names(prompts: Sequence[str], num_videos: int) -> list[str]:
    """`0001-a-cat`, or `0001-a-cat-1` and so on for several videos of a prompt."""
    ends = [f"-{index}" for index in range(1, num_videos + 1)] if num_videos > 1 else [""]
    return [f"{number:04d}-{slug(prompt)}{end}" for number, prompt in enumerate(prompts, 1) for end in ends]


def vbench_names(prompts: Sequence[str], num_videos: int) -> list[str]:
    """`a cat-0` and so on, as VBench finds the videos of a prompt: by the prompt itself, letter for letter.

    Of a prompt that comes again, with another seed, the numbers go on.

    Raises:
        ValueError: for a prompt that no file can be called by.
    """
    names, made = list[str](), Counter[str]()
    for prompt in prompts:
        indices = range(made[prompt], made[prompt] + num_videos)
        made[prompt] += num_videos
        names += [f"{prompt}-{index}" for index in indices]
        longest = len(names[-1].encode())
        wrong = "it holds a '/'" if "/" in prompt else "it begins with a dot" if prompt.startswith(".") else None
        if not prompt.isprintable():
            wrong = "it holds characters that are not printed, such as the end of a line"
        elif longest > _LONGEST_NAME:
            wrong = f"it is {longest} bytes long with its number, and a name has {_LONGEST_NAME} at most"
        if wrong:
            raise ValueError(f"expected prompts that files can be called by, for --layout vbench; {prompt!r}: {wrong}")
    return names


LAYOUTS = {"plain": plain_names, "vbench": vbench_names}


def numbered(path: Path, count: int) -> list[Path]:
    """`out.mp4` -> [out.mp4], or [out-1.mp4, out-2.mp4, …] for several."""
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_name(f"{path.stem}-{index:0{digits}d}{path.suffix}") for index in range(1, count + 1)]


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, lower case, joined by dashes."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "video"
