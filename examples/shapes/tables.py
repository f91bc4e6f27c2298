"""Writes docs/tables.md: each of the paper's tables beside ours, from whatever measure.py has measured so far.

python examples/shapes/tables.py          # or: make tables
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ablate import BEYOND, PAPERS, ROWS, SEEDS, TEACHER, weights_of
from ablate import TABLES as LINES
from measure import digest_of

from diffusers_mcm.evaluation.distances import Interval, paired_interval
from diffusers_mcm.files import write_text
from diffusers_mcm.tables import table

HERE = Path(__file__).resolve().parent
STEPS = ("1", "2", "4", "8")
ORACLE = {
    "oracle.all_right": ("all right, %", 100, 1),
    "oracle.identity_kept": ("identity kept, %", 100, 1),
    "oracle.wobble": ("wobble", 1, 3),
    "oracle.displacement": ("displacement", 1, 4),
    "motion.change": ("change", 1, 2),
    "motion.near_still": ("near still, %", 100, 1),
    "motion.flicker": ("flicker", 1, 3),
    "oracle.watermark_seen": ("watermark, %", 100, 1),
}
DIGITS = {"fvd": 2, "clipsim": 2, "fid.clean": 1, "fid.cartoon": 1}
TITLES = {"fvd": "FVD", "clipsim": "CLIPSIM", "fid.clean": "FID (clean)", "fid.cartoon": "FID (cartoon)"}


class Ordering(NamedTuple):
    """What the paper's numbers say of two lines: in `measure`, `better` is better than `worse`.

    With a `margin` by at least that share of the worse one, of a measure of which less is better; with `steps` there
    alone.
    """

    measure: str
    better: str
    worse: str
    margin: float = 0
    steps: tuple[str, ...] = STEPS


class Table(NamedTuple):
    """One table of the paper, or of what is beyond it, and what of it should hold here. Its lines are ablate.py's."""

    title: str
    measures: tuple[str, str]
    orderings: tuple[Ordering, ...]
    note: str = ""


class Found(NamedTuple):
    """The worse line less the better one, of what its margin leaves of it."""

    interval: Interval  # over captions
    agreeing: int  # trainings of which it is above 0
    trained: int
    worse: float  # the worse line's own score


def orderings(measure: str, *chain: str) -> tuple[Ordering, ...]:
    """The first of a chain better than the second, that better than the third, and so on."""
    return tuple(Ordering(measure, better, worse) for better, worse in zip(chain, chain[1:]))


SAMPLERS = {"DDIM": "teacher-ddim", "DPM++": "teacher-dpm"}  # lines of Table 1 that nothing is trained for
_BOTH = ("fvd", "clipsim")
TABLES = {
    1: Table(
        "Table 1: against samplers and LCM, the videos' own frames as images",
        _BOTH,
        (
            *(Ordering("fvd", "mixed", other) for other in ("lcm", "teacher-ddim", "teacher-dpm")),
            Ordering("clipsim", "mixed", "lcm", steps=("1", "2", "4")),
        ),
        "The paper has two teachers, on 500 validation videos of WebVid. Here there is one, built as ModelScopeT2V is;"
        " for AnimateDiff, AnimateLCM and AnimateDiff-Lightning there are no weights that know this world. FVD is that"
        " to the poor videos of the world. MCM with clean images is trained away from how they look: where it lies far"
        " from them, it succeeded. The paper's MCM is the one with the videos' own frames.",
    ),
    2: Table(
        "Table 2: zero-shot, on videos of another kind",
        _BOTH,
        (),
        "The paper's LoRAs of Table 1 on the validation videos of MSR-VTT. Nothing here is measured on videos of a"
        " kind that was not trained on, for no other world is known to the networks that measure; only the captions"
        " are held out.",
    ),
    3: Table(
        "Table 3: frames like the images, in one stage or in two",
        ("fid.clean", "fid.cartoon"),
        tuple(
            Ordering(f"fid.{domain}", domain, f"two-stage-{domain}", margin, steps)
            for margin, steps in ((0, STEPS), (0.3, ("4",)))
            for domain in ("clean", "cartoon")
        ),
        "FID is that of the videos' frames to clean and to cartoon images. A line is meant for the column of its own"
        " images; what the other says of it is no merit and no fault.",
    ),
    4: Table(
        "Table 4: what each component gives",
        _BOTH,
        (*orderings("fvd", "mixed", "mcd", "adversarial"), *orderings("fvd", "mcd", "lcm")),
    ),
    5: Table(
        "Table 5: what motion is compared by",
        _BOTH,
        tuple(Ordering("fvd", "mcd", other) for other in ("adversarial", "diff", "corr", "low", "high")),
    ),
    6: Table(
        "Table 6: how many trajectories start from real videos",
        _BOTH,
        tuple(Ordering("fvd", "mixed", other) for other in ("mcd", "generated")),
    ),
    7: Table(
        "Beyond the paper: what should keep a shape itself",
        ("fvd", "fid.clean"),
        (),
        "Two flags that are off by default, each alone against the paper's method with as many steps: a distance"
        " between how student and target change from frame to frame, and a second adversarial loss, which judges"
        " neighbouring frames ([Things that change within a clip](method.md#things-that-change-within-a-clip)). What"
        " they are for, identity kept, wobble and flicker, is in the second table.",
    ),
}


class Results:
    """What measure.py wrote: row -> training seed -> step -> scores and draws."""

    def __init__(self, folder: Path):
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.versions: set[str] = set()  # of the packages that measured
        path = folder / "protocol.json"
        self.protocol = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        for name in (*SAMPLERS.values(), *ROWS):
            for seed in SEEDS if name in ROWS else (0,):
                file = folder / (f"{name}-{seed}.json" if name in ROWS else f"{name}.json")
                if file.is_file():
                    found = json.loads(file.read_text(encoding="utf-8"))
                    if found["protocol"] != digest_of(self.protocol):
                        raise ValueError(f"{file} was measured by another protocol than {path}: measure it again.")
                    self.versions.add(
                        ", ".join(f"{package} {number}" for package, number in found["versions"].items())
                    )
                    self.rows.setdefault(name, {})[seed] = found["steps"]

    def seeds(self, row: str) -> int:
        """How many trainings of a row were measured."""
        return len(self.rows.get(row, {}))

    def values(self, row: str, steps: str, measure: str) -> np.ndarray:
        """One score of each training of a row (seeds,); NaN where there was nothing to measure."""
        found = [seed[steps]["values"].get(measure) for seed in self.rows.get(row, {}).values()]
        return np.array([np.nan if value is None else value for value in found])

    def cell(self, row: str, steps: str, measure: str, digits: int, factor: float = 1) -> str:
        """The mean over the trainings, with their deviation where there are several."""
        values = factor * self.values(row, steps, measure)
        if not len(values) or np.isnan(values).all():
            return "–"
        spread = f" ± {np.nanstd(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.nanmean(values):.{digits}f}{spread}"

    def shared(self, ordering: Ordering) -> list[int]:
        """The seeds of which both lines have a training; the teacher, which has none, goes with each of the other."""
        seeds = [set(self.rows.get(row, {})) for row in (ordering.worse, ordering.better)]
        if ordering.worse in SAMPLERS.values() and seeds[0]:
            return sorted(seeds[1])
        return sorted(seeds[0] & seeds[1])

    def difference(self, ordering: Ordering, steps: str) -> Found | None:
        """How far apart the two lines of an ordering are; None where no training of both was measured."""
        seeds, measure = self.shared(ordering), ordering.measure
        if not seeds:
            return None
        sign = -1 if measure == "clipsim" else 1  # there more is better
        better = [self.rows[ordering.better][seed][steps] for seed in seeds]
        rows = self.rows[ordering.worse]
        worse = [rows[seed if ordering.worse in ROWS else 0][steps] for seed in seeds]
        left = 1 - ordering.margin
        apart = [sign * (left * w["values"][measure] - b["values"][measure]) for w, b in zip(worse, better)]
        draws = [np.mean([each["draws"][measure] for each in line], axis=0) for line in (worse, better)]
        interval = paired_interval(float(np.mean(apart)), sign * (left * draws[0] - draws[1]))
        own = float(np.mean([each["values"][measure] for each in worse]))
        return Found(interval, sum(value > 0 for value in apart), len(seeds), own)


def paper_table(said: Mapping[str, Any]) -> str:
    """The paper's numbers."""
    columns = [f"{measure} @{steps}" for measure in said["measures"] for steps in STEPS]
    rows = [
        (
            name,
            {
                column: f"{value:.2f}" if "CLIPSIM" in column else f"{value:g}"
                for column, value in zip(columns, sum(parts, []))
            },
        )
        for name, parts in said["rows"].items()
    ]
    return table(rows, columns)


def our_table(number: int, results: Results) -> str:
    """The same rows and columns here."""
    which, rows = TABLES[number], []
    for name, row in lines(number).items():
        cells = {
            f"{TITLES[measure]} @{steps}": results.cell(row, steps, measure, DIGITS[measure])
            for measure in which.measures
            for steps in STEPS
        }
        count = results.seeds(row)
        trained = "not trained" if row in SAMPLERS.values() else f"{count} training{'s'[: count != 1]}"
        rows.append((f"{name} ({trained})", cells))
    return table(rows, [f"{TITLES[measure]} @{steps}" for measure in which.measures for steps in STEPS])


def lines(number: int) -> dict[str, str]:
    """The lines of a table, and the rows that they show."""
    return (SAMPLERS if number == 1 else {}) | LINES[number]


def oracle_table(number: int, results: Results) -> str:
    """What the oracle and the pixels say, step by step."""
    rows = []
    for name, row in lines(number).items():
        for steps in STEPS if results.seeds(row) else ():
            cells = {title: results.cell(row, steps, key, digits, by) for key, (title, by, digits) in ORACLE.items()}
            rows.append((f"{name} @{steps}", cells))
    return table(rows, [title for title, *_ in ORACLE.values()])


def verdicts(number: int, results: Results) -> str:
    """Which of the paper's orderings hold here, step by step."""
    rows, names = [], {row: name for name, row in lines(number).items()}
    for ordering in TABLES[number].orderings:
        trained = len(results.shared(ordering))
        cells = {"trainings": str(trained) if trained > 1 else f"{trained}: not ranked"}
        for steps in ordering.steps:
            if (found := results.difference(ordering, steps)) is not None:
                cells[f"@{steps}"] = _told(found, ordering)
        by = f" by {ordering.margin:.0%} and more" if ordering.margin else ""
        label = f"{names[ordering.better]}, better than {names[ordering.worse]}{by}"
        rows.append((f"{TITLES[ordering.measure]}: {label}", cells))
    return table(rows, [*(f"@{steps}" for steps in STEPS), "trainings"])


def _told(found: Found, ordering: Ordering) -> str:
    """The difference with its interval, and whether the ordering holds; with a margin, in parts of the worse line."""
    texts = [f"{value:.{DIGITS[ordering.measure]}f}" for value in found.interval]
    if ordering.margin:
        texts = [f"{value / found.worse + ordering.margin:.0%}" for value in found.interval]
    word = f"{_verdict(found)}, {found.agreeing} of {found.trained}: " if found.trained > 1 else ""
    return f"{word}{texts[0]} ({texts[1]} to {texts[2]})"


def _verdict(found: Found) -> str:
    """Ranked only where the captions decide and no training says otherwise."""
    if found.interval.low > 0 and found.agreeing == found.trained:
        return "holds"
    return "**does not hold**" if found.interval.high < 0 and not found.agreeing else "unclear"


HEAD = """# The paper's tables in miniature

Each table of the paper beside the same one in the world of shapes, where anybody can run it: the packaged teacher, the
poor videos, one short recipe (600 steps of batch 8 from a fresh LoRA) for all rows, three trainings of each with other
seeds. `examples/shapes/ablate.py` trains, `examples/shapes/measure.py` measures, and `make tables` writes this page
from what there is so far: {trained} of {all} trainings, and {beyond} of {all_beyond} of what is
beyond the paper.

FVD is the Fréchet distance on `mcm-shapes-video`, a small video network that was trained to tell motion; FID that on
`mcm-shapes-features`, CLIPSIM that of `mcm-shapes-clip`. Absolute numbers have nothing to do with the paper's, whose
networks, videos and sizes are others; orderings can be compared. {protocol}

{samplers}

A number is the mean over the trainings ± their deviation. Below each table: the paper's orderings, as the worse line
less the better one, with the 95 % interval of the paired difference over captions, and in how many of the trainings
it has that sign; where the paper says by how much, in parts of the worse line. The interval says how far these
captions decide, not how far another training would differ; where there is one training of a line, nothing is ranked.
The last table of each shows what neither measure sees: what a rule-based oracle reads off the pixels. «All right» is
colour, shape, motion and background; «identity kept» the share of clips whose every frame reads as the same shape;
«wobble» how much the outline, centred and brought to one size, changes from one frame to the next (1 less the
overlap, intersection over union); displacement is in parts of the side, a frame. What stands between comment marks is
written by hand, and stays when the page is written again.
"""


def told_samplers(protocol: Mapping[str, Any]) -> str:
    """How the lines were sampled: spacing and guidance decide a baseline."""
    names, parts = {row: name for name, row in SAMPLERS.items()}, []
    for row, how in protocol["samplers"].items():
        scales = {f"{scale:g}" for scale in how["guidance"].values()}
        steps = ", ".join(f"{scale:g} at {steps}" for steps, scale in how["guidance"].items())
        guidance = f"guidance {scales.pop()} at all steps" if len(scales) == 1 else f"guidance {steps} steps"
        parts.append(f"{names.get(row, 'what is trained')}: `{how['sampler']}`, spacing {how['spacing']}, {guidance}")
    return f"Samplers: {'; '.join(parts)}. The teacher's guidance is {protocol['guidance']}."


def told_decoder(protocol: Mapping[str, Any]) -> str:
    """Whether the decoder that drew the videos is the packaged one: another draws other videos of the same latents."""
    measured = protocol["teacher"]["vae"]
    packaged = weights_of(TEACHER)["vae"]
    if measured == packaged:
        return "All sampled ones were drawn by the teacher's packaged decoder."
    return (
        f"All sampled ones were drawn by a decoder of the teacher (sha256 {measured[:12]}…) that is not the packaged"
        f" one ({packaged[:12]}…)."
    )


def page(results: Results, paper: Mapping[str, Any], findings: Mapping[int, str]) -> str:
    """The whole page, in markdown; `findings` are written by hand, by the numbers of the tables."""
    protocol, samplers = results.protocol, "Samplers, their spacing and guidance are said here when that is done."
    said = "Nothing has been measured yet."
    if protocol:
        samplers = told_samplers(protocol)
        said = f"Each has {protocol['videos']} videos of {protocol['captions']} held-out captions, which are compared "
        said += f"with {protocol['reference']}; images: {protocol['images']}. {told_decoder(protocol)} Networks, with"
        said += " their hashes, and what else decides the numbers stand in `examples/shapes/ablation/protocol.json`;"
        said += f" measured with {' and with '.join(sorted(results.versions))}."
    trained = sum(results.seeds(row) for row in PAPERS)
    beyond = sum(results.seeds(row) for row in BEYOND)
    counts = dict(trained=trained, all=len(PAPERS) * len(SEEDS), beyond=beyond, all_beyond=len(BEYOND) * len(SEEDS))
    parts = [HEAD.format(**counts, protocol=said, samplers=samplers).rstrip("\n")]
    for number, which in TABLES.items():
        parts += [f"## {which.title}", *([which.note] if which.note else [])]
        if theirs := paper.get(str(number)):
            parts += ["The paper:", paper_table(theirs)]
        if number not in LINES:
            continue
        parts += ["Here:", our_table(number, results)]
        if which.orderings:
            parts += ["The paper's orderings:", verdicts(number, results)]
        parts += ["Read by the oracle and from pixels:", oracle_table(number, results)]
        parts.append(f"<!-- findings {number} -->\n{findings.get(number, '')}\n<!-- /findings {number} -->")
    return "\n\n".join(parts) + "\n"


def findings_of(path: Path) -> dict[int, str]:
    """What was written by hand into a page, by the numbers of its tables.

    Raises:
        ValueError: where the marks of a table are not there once each, in their order.
    """
    if not path.is_file():
        return {}
    text, found = path.read_text(encoding="utf-8"), {}
    for number in TABLES:
        parts = re.split(f"<!-- /?findings {number} -->", text)
        opening, closing = f"<!-- findings {number} -->", f"<!-- /findings {number} -->"
        if len(parts) == 3 and opening in text and closing in text and text.index(opening) < text.index(closing):
            found[number] = parts[1].strip("\n")
        elif len(parts) > 1:
            raise ValueError(f"expected one {opening} and then one {closing} in {path}: what lies between them stays")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "ablation", help="what measure.py wrote")
    parser.add_argument(
        "--page", type=Path, default=HERE.parents[1] / "docs" / "tables.md", help="where the page goes"
    )
    args = parser.parse_args(arguments)
    paper = json.loads((HERE / "paper.json").read_text(encoding="utf-8"))
    write_text(args.page, page(Results(args.results), paper, findings_of(args.page)))
    print(args.page)


if __name__ == "__main__":
    main()
