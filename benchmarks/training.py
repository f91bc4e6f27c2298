"""What a training run costs, figure by figure, against a work tree of the commit before.

    git worktree add ../before COMMIT
    python benchmarks/training.py --before ../before --document docs/performance.md
    python benchmarks/training.py --before ../before --rows tars "a step"     # some of the rows
    python benchmarks/training.py --pairs 1 --small                           # a check of the script

A row is measured by a fresh process that imports the package from either tree, in turns: this one, the one before,
this one … Its figures are medians, and the ratio is the median of the pairs' ratios. Rows are in the modules of
`ROW_MODULES` that lie beside this script: a module has `ROWS`, name -> `Row`, what a row measures runs on both trees.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROW_MODULES = ("training_data", "training_step")
HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """Something that is measured: `measure(folder, small)` gives its figures, by their names as the table shows them.

    `prepare(folder, small)` makes what it works on, once for all its runs; `targets` are words beside the figures.
    """

    measure: Callable[[Path, bool], dict[str, float]]
    prepare: Callable[[Path, bool], None] = lambda folder, small: None
    targets: dict[str, str] = field(default_factory=dict)


def all_rows() -> dict[str, Row]:
    return {name: row for module in ROW_MODULES for name, row in importlib.import_module(module).ROWS.items()}


def measured(name: str, tree: Path, folder: Path, small: bool) -> dict[str, float] | None:
    """The figures of a row in a fresh process with the package of that tree; None if it cannot do such a thing."""
    command = [sys.executable, __file__, "--measure", name, "--data", str(folder), *(["--small"] if small else [])]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: the package in {tree} does not do that:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, row: Row, options: argparse.Namespace) -> dict[str, list[dict[str, float] | None]]:
    """The figures of each run, with this tree and with the one before, which take turns."""
    trees = {"now": HERE} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[str, list[dict[str, float] | None]] = {which: [] for which in trees}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        row.prepare(Path(folder), options.small)
        for _ in range(options.pairs):
            for which, tree in trees.items():
                found[which].append(measured(name, tree, Path(folder), options.small))
                print(f"{name}, {which}: {found[which][-1]}", flush=True)
    return found


def rows_of(results: dict[str, dict]) -> list[tuple[str, dict[str, str]]]:
    """The table's lines: a figure each."""
    lines = []
    for name, result in results.items():
        now, before = result["now"], result.get("before") or [None] * len(result["now"])
        for figure in now[0] or {}:
            values = [run[figure] for run in now if run]
            cells = {"now": _shown(statistics.median(values)), "target": result["targets"].get(figure, "–")}
            pairs = [(a[figure], b[figure]) for a, b in zip(now, before) if a and b and figure in b]
            if pairs:
                cells["before"] = _shown(statistics.median(b for _, b in pairs))
            if pairs and all(b for _, b in pairs):
                cells["now / before"] = f"{statistics.median(a / b for a, b in pairs):.3g}"
            lines.append((f"{name}: {figure}", cells))
    return lines


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


COLUMNS = ["before", "now", "now / before", "target"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--before", type=Path, help="work tree of the commit before; without it there is nothing beside"
    )
    parser.add_argument("--rows", nargs="+", help="those that are measured; the results of others stay")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each tree")
    parser.add_argument("--small", action="store_true", help="little data, to check the script")
    parser.add_argument("--scratch", type=Path, help="folder for the data, some 2 GB; by default that of the system")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training.json"), help="results, added to")
    parser.add_argument("--document", type=Path, help="file whose <!-- training --> section takes the table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the processes that measure
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options, rows = parse(arguments), all_rows()
    if options.measure:
        print("\n" + json.dumps(rows[options.measure].measure(options.data, options.small)))
        return
    # Not in the processes that measure: they import the package of either tree, and no more than they measure.
    from results import machine, read_results, write_results

    from diffusers_mcm.tables import replace_section, table

    if unknown := set(options.rows or ()) - set(rows):
        raise SystemExit(f"There are no rows {sorted(unknown)}; there are {list(rows)}.")
    results = read_results(options.output)
    for name in options.rows or rows:
        found = compare(name, rows[name], options)
        results[name] = {"machine": machine("cpu"), "targets": rows[name].targets, **found}
        write_results(options.output, results)
    text = table(rows_of(results), COLUMNS)
    print(text)
    if options.document:
        replace_section(options.document, "training", text)


if __name__ == "__main__":
    main()
