"""What an evaluation found, with the protocol it was found by: `evaluation.json`, `evaluation.md` and a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_text
from ..tables import table
from . import page
from .distances import Interval
from .metrics import METRICS, Column, column_of
from .picture import draw
from .records import TRAILING_STEPS, Difference, Method

FORMAT = 1  # of evaluation.json
JSON_NAME, PAGE_NAME, PICTURE_NAME = "evaluation.json", "evaluation.md", "evaluation.png"


@dataclass(frozen=True)
class Evaluation:
    """All results in one folder: one protocol, any number of methods.

    Attributes:
        protocol: what decides the numbers. Methods of different protocols are never put side by side.
        versions: of the packages that computed them in the last call, for the record.
        reference: what was found of the reference itself, where no reference is needed to say it; its settings say how
            it was opened, and which images there were besides.
        methods: by name, in the order in which they were given.
        differences: between all pairs of methods that were measured in one call.
        notes: what a reader of the table has to know.
        resamples: of the captions, for the intervals of the last call.
    """

    protocol: Mapping[str, Any]
    versions: Mapping[str, str]
    reference: Method
    methods: Mapping[str, Method]
    differences: Sequence[Difference] = field(default_factory=tuple)
    notes: Sequence[str] = ()
    resamples: int = 0

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Evaluation | None":
        """What an earlier evaluation wrote into a folder; None if there is nothing."""
        path = Path(folder, JSON_NAME)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            told = {"versions": found["versions"]}  # where methods do not say their own
            methods = {name: Method(**told | method) for name, method in found["methods"].items()}
            resamples = found.get("resamples", 0)
            differences = [
                Difference(**{"resamples": resamples, **each, "interval": Interval(*each["interval"])})
                for each in found["differences"]
            ]
            reference = Method(**found["reference"])
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}")
            about = found["protocol"], found["versions"], reference
            return cls(*about, methods, differences, found["notes"], resamples)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no result of an evaluation that this version wrote ({error!r}): choose another folder"
            ) from error

    def with_others(self, before: "Evaluation | None", where: str) -> "Evaluation":
        """These results beside those of before; of a method that is in both, these.

        What stays of before are methods that are not in these, and differences whose scores are the same as they were.

        Raises:
            ValueError: if they were found by another protocol; the message names each field that differs.
        """
        if before is None:
            return self
        stays = before.methods.keys() - self.methods.keys()
        # which samples these are is settled anew where all methods are scored together
        known = {key: value for key, value in before.protocol.items() if stays or key != "samples"}
        check_protocols(
            known, {key: value for key, value in self.protocol.items() if stays or key != "samples"}, where
        )
        together = {**before.methods, **self.methods}
        found = {frozenset((each.method, each.less)) for each in self.differences}
        kept = [
            each
            for each in before.differences
            if frozenset((each.method, each.less)) not in found
            and all(
                before.methods[name].values.get(each.column) == together[name].values.get(each.column)
                for name in (each.method, each.less)
            )
        ]
        notes = list(dict.fromkeys([*(before.notes if stays else ()), *self.notes]))
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
            ending = TRAILING_STEPS.search(name)
            own = ending is not None and int(ending[1]) == method.steps and ending.start() > 0
            found.setdefault(name[: ending.start()] if ending and own else name, []).append(
                (method.steps, method.values)
            )
        return found

    def rows(self) -> list[tuple[str, dict[str, str]]]:
        """The table of methods, the reference first: each name with its cells by column."""
        rows = []
        for name, method in {page.REFERENCE: self.reference, **self.methods}.items():
            cells = {"steps": str(method.steps or "–"), "videos": str(method.num_videos)}
            for column in self.columns():
                value = method.values.get(column.key)
                cells[column.title] = "–" if value is None else column.format(value)
            rows.append((name, cells))
        return rows

    def summary(self) -> str:
        """The table of methods, in markdown, and what a reader has to know of it."""
        remarks = page.remarks(self.reference, self.methods)
        return "\n\n".join([table(self.rows(), self._titles()), *self.notes, *remarks])

    def _titles(self) -> list[str]:
        return ["steps", "videos", *(column.title for column in self.columns())]

    def card_table(self) -> dict[str, Any]:
        """What a model card shows: a sentence, the columns, and a row for each method."""
        titles = self._titles()
        rows = [[name, *(cells[title] for title in titles)] for name, cells in self.rows()]
        about = (
            f"Measured against {self.reference.num_videos} videos of `{self.reference.source}`, "
            f"{self.protocol['window']['num_frames']} frames each, by `diffusers-mcm evaluate`. Numbers of another "
            "protocol, number of videos or feature network cannot be laid beside these."
        )
        return {"about": about, "columns": titles, "rows": rows}

    def page(self) -> str:
        """The results in markdown: protocol, methods and how they were made, differences, what was skipped."""
        columns = self.columns()
        parts = ["# Evaluation", page.head(self.protocol, self.versions, self.resamples, self.reference, self.methods)]
        parts += ["## Methods", self.summary()]
        better = [f"{c.title}: {c.metric.better} is better" for c in columns if c.metric.better]
        still = "A still video raises CLIPSIM and every measure of consistency: read them beside the motion."
        parts.append(". ".join([*(["; ".join(better)] if better else []), still]))
        parts += ["## How the samples were made", page.settings(self.reference, self.methods)]
        if len(self.methods) > 1:
            text = page.differences(self.methods, self.differences, columns, self.resamples)
            parts += ["## Differences", text]
        if skipped := page.skipped(self.reference, self.methods):
            parts += ["## Skipped", skipped]
        return "\n\n".join(parts) + "\n"


def check_protocols(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """`ValueError` that names what differs unless two protocols are one."""
    a, b = page.flat(before), page.flat(json.loads(json.dumps(now)))
    differ = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if differ:
        lines = "".join(f"\n  {key}: {a.get(key)!r} there, {b.get(key)!r} now" for key in differ[:8])
        raise ValueError(
            f"the results in {where} were found by another protocol, and numbers of two protocols cannot be laid side "
            f"by side: choose another --output, or measure as before. What differs:{lines}"
        )
