"""What an evaluation found, with the protocol it was found by: `evaluation.json`, `evaluation.md` and a picture."""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_text
from ..tables import table
from .distances import Interval
from .metrics import METRICS, Column, column_of
from .picture import draw

FORMAT = 1  # of evaluation.json
JSON_NAME, PAGE_NAME, PICTURE_NAME = "evaluation.json", "evaluation.md", "evaluation.png"
_TRAILING_STEPS = re.compile(r"[-_ ]?(\d+)(?:[-_ ]?steps?)?$")


@dataclass(frozen=True)
class Method:
    """What was found of one folder of samples.

    Attributes:
        source: the folder.
        num_videos: how many were read; `skipped` names the others, with the reason.
        num_captions: how many different ones.
        steps: of sampling, where the samples say it.
        settings: what all samples say of how they were made.
        values: column's key -> score, None where there is none.
    """

    source: str
    num_videos: int
    num_captions: int
    skipped: Mapping[str, str]
    steps: int | None
    settings: Mapping[str, Any]
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Difference:
    """One method less another in one column, with the paired 95 % interval over captions."""

    method: str
    less: str
    column: str
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class Evaluation:
    """All results in one folder: one protocol, any number of methods.

    Attributes:
        protocol: what decides the numbers. Methods of different protocols are never put side by side.
        versions: of the packages that computed them, for the record.
        reference: what was found of the reference itself, where no reference is needed to say it.
        methods: by name, in the order in which they were given.
        differences: between all pairs of methods that were measured in one call.
        notes: what a reader of the table has to know.
    """

    protocol: Mapping[str, Any]
    versions: Mapping[str, str]
    reference: Method
    methods: Mapping[str, Method]
    differences: Sequence[Difference] = field(default_factory=tuple)
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Evaluation | None":
        """What an earlier evaluation wrote into a folder; None if there is nothing."""
        path = Path(folder, JSON_NAME)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            methods = {name: Method(**method) for name, method in found["methods"].items()}
            differences = [
                Difference(each["method"], each["less"], each["column"], Interval(*each["interval"]))
                for each in found["differences"]
            ]
            reference = Method(**found["reference"])
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}")
            return cls(found["protocol"], found["versions"], reference, methods, differences, found["notes"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no result of an evaluation that this version wrote ({error!r}): choose another folder"
            ) from error

    def with_others(self, before: "Evaluation | None", where: str) -> "Evaluation":
        """These results beside those of before; of a method that was measured again the new ones.

        Raises:
            ValueError: if they were found by another protocol; the message names each field that differs.
        """
        if before is None:
            return self
        check_protocols(before.protocol, self.protocol, where)
        anew = set(self.methods)
        kept = [each for each in before.differences if not {each.method, each.less} & anew]
        notes = list(dict.fromkeys([*before.notes, *self.notes]))
        together = {**before.methods, **self.methods}
        return replace(self, methods=together, differences=[*kept, *self.differences], notes=notes)

    def columns(self) -> list[Column]:
        """All columns in which anything has a score, in the order of the table of metrics."""
        keys = dict.fromkeys(key for each in (*self.methods.values(), self.reference) for key in each.values)
        order = list(METRICS)
        return [column_of(key) for key in sorted(keys, key=lambda key: order.index(key.partition(".")[0]))]

    def write(self, folder: str | os.PathLike) -> None:
        """Write the three files, each whole or not at all."""
        about = {"format": FORMAT} | json.loads(json.dumps(asdict(self))) | {"table": self.card_table()}
        write_text(Path(folder, PAGE_NAME), self.page().encode("utf-8", "backslashreplace").decode())
        draw(Path(folder, PICTURE_NAME), self.series(), self.reference.values, self.columns())
        write_text(Path(folder, JSON_NAME), json.dumps(about, indent=2) + "\n")

    def series(self) -> dict[str, list[tuple[int, Mapping[str, float | None]]]]:
        """The scores of the methods whose steps are known, under their names without the steps: `mcm` for `mcm4`."""
        found: dict[str, list] = {}
        for name, method in self.methods.items():
            if method.steps is None:
                continue
            ending = _TRAILING_STEPS.search(name)
            own = ending is not None and int(ending[1]) == method.steps and ending.start() > 0
            found.setdefault(name[: ending.start()] if ending and own else name, []).append(
                (method.steps, method.values)
            )
        return found

    def rows(self) -> list[tuple[str, dict[str, str]]]:
        """The table of methods, the reference first: each name with its cells by column."""
        rows = []
        for name, method in {"(reference)": self.reference, **self.methods}.items():
            cells = {"steps": str(method.steps or "–"), "videos": str(method.num_videos)}
            for column in self.columns():
                value = method.values.get(column.key)
                cells[column.title] = "–" if value is None else column.format(value)
            rows.append((name, cells))
        return rows

    def summary(self) -> str:
        """The table of methods, in markdown."""
        return "\n\n".join([table(self.rows(), self._titles()), *self.notes])

    def _titles(self) -> list[str]:
        return ["steps", "videos", *(column.title for column in self.columns())]

    def card_table(self) -> dict[str, Any]:
        """What a model card shows: a sentence, the columns, and a row for each method."""
        titles = self._titles()
        rows = [[name, *(cells[title] for title in titles)] for name, cells in self.rows()]
        about = (
            f"Measured against {self.reference.num_videos} videos of the reference, "
            f"{self.protocol['window']['num_frames']} frames each, by `diffusers-mcm evaluate`. Numbers of another "
            "protocol, number of videos or feature network cannot be laid beside these."
        )
        return {"about": about, "columns": titles, "rows": rows}

    def page(self) -> str:
        """The results in markdown: protocol, methods, differences, what was skipped."""
        parts = ["# Evaluation", _head(self.protocol, self.versions), "## Methods", self.summary()]
        better = [f"{c.title}: {c.metric.better} is better" for c in self.columns() if c.metric.better]
        still = "A still video raises CLIPSIM and every measure of consistency: read them beside the motion."
        parts.append(". ".join([*(["; ".join(better)] if better else []), still]))
        if self.differences:
            parts += ["## Differences", _differences(self, self.columns())]
        skipped = [
            f"- {name}: {file}: {reason}"
            for name, method in {"the reference": self.reference, **self.methods}.items()
            for file, reason in method.skipped.items()
        ]
        if skipped:
            parts += ["## Skipped", "\n".join(skipped)]
        return "\n\n".join(parts) + "\n"


def check_protocols(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """`ValueError` that names what differs unless two protocols are one."""
    a, b = _flat(before), _flat(json.loads(json.dumps(now)))
    differ = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if differ:
        lines = "".join(f"\n  {key}: {a.get(key)!r} there, {b.get(key)!r} now" for key in differ[:8])
        raise ValueError(
            f"the results in {where} were found by another protocol, and numbers of two protocols cannot be laid side "
            f"by side: choose another --output, or measure as before. What differs:{lines}"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, Mapping):
        return {name: value}
    parts = (_flat(each, f"{name}.{key}" if name else str(key)) for key, each in value.items())
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def _head(protocol: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    rows = [(f"`{key}`", {"value": str(value)}) for key, value in _flat(protocol).items()]
    rows.append(("versions", {"value": ", ".join(f"{name} {version}" for name, version in versions.items())}))
    return table(rows, ["value"])


def _differences(evaluation: Evaluation, columns: Sequence[Column]) -> str:
    """Every method less the first, with intervals; in bold where 0 lies outside."""
    first = next(iter(evaluation.methods))
    rows: dict[str, dict[str, str]] = {}
    by_key = {column.key: column for column in columns}
    for each in evaluation.differences:
        if first not in (each.method, each.less) or each.column not in by_key:
            continue
        sign = -1 if each.method == first else 1
        values = sorted(sign * value for value in each.interval[1:])
        column = by_key[each.column]
        text = f"{column.format(sign * each.interval.estimate)} ({' to '.join(map(column.format, values))})"
        other = each.less if each.method == first else each.method
        rows.setdefault(other, {})[column.title] = f"**{text}**" if each.is_clear else text
    shown = [column.title for column in columns if any(column.title in cells for cells in rows.values())]
    about = (
        f"Each method less {first}, with the 95 % interval of the paired difference over captions; bold where 0 lies "
        "outside. It holds for these captions and these weights: another training may differ by more."
    )
    return f"{about}\n\n{table(list(rows.items()), shown)}"
