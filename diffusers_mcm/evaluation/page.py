"""The parts of `evaluation.md`, in markdown: everything that a reader of the numbers has to know."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import table
from .metrics import Column
from .records import Difference, Method

REFERENCE = "(reference)"
_SAME_RATE = 1.05  # the highest frame rate by the lowest, up to which they count as one


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, Mapping):
        return {name: value}
    parts = (flat(each, f"{name}.{key}" if name else str(key)) for key, each in value.items())
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def head(
    protocol: Mapping[str, Any],
    versions: Mapping[str, str],
    resamples: int,
    reference: Method,
    methods: Mapping[str, Method],
) -> str:
    """Against what the numbers were found, by what protocol and with which versions."""
    lines = {"measured against": ", ".join([reference.source, *_said(reference)])}
    lines |= {f"`{key}`": str(value) for key, value in flat(protocol).items()}
    lines["`resamples`"] = f"{resamples} of the captions, for the intervals"
    lines["versions"] = _listed(versions)
    for name, method in methods.items():
        if method.versions and method.versions != versions:
            lines[f"versions that measured {name}"] = _listed(method.versions)
    return table([(name, {"value": value}) for name, value in lines.items()], ["value"])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _said(method: Method) -> list[str]:
    """What a method's settings say, each in a few words."""
    return [f"{key} {value}" for key, value in flat(method.settings).items() if value is not None]


def rate(fps: Sequence[float] | None) -> str:
    """A rate of frames, or the lowest and the highest of several."""
    if fps is None:
        return "unknown"
    low, high = (f"{value:.4g}" for value in fps)
    return low if low == high else f"{low} to {high}"


def other_rates(reference: Method, methods: Mapping[str, Method]) -> dict[str, str]:
    """The methods whose clips have other frame rates than the reference's, each with its own."""
    if reference.fps is None:
        return {}
    known = {name: method.fps for name, method in methods.items() if method.fps is not None}
    return {
        name: rate(fps)
        for name, fps in known.items()
        if max(*fps, *reference.fps) > _SAME_RATE * min(*fps, *reference.fps)
    }


def rate_remarks(reference: Method, methods: Mapping[str, Method]) -> list[str]:
    """A sentence if clips of several frame rates are compared; none otherwise."""
    others = other_rates(reference, methods)
    told = ", ".join(f"those of {name} {fps}" for name, fps in others.items())
    sentence = (
        f"The clips of the reference have {rate(reference.fps)} frames a second, but {told}: at two rates the same"
        " motion is not the same, and counts as a fault. --fps and --frame_interval read the reference at another."
    )
    return [sentence] if others else []


def remarks(reference: Method, methods: Mapping[str, Method]) -> list[str]:
    """What a reader of the table has to know: what was skipped, whose frame rate and whose steps are in question."""
    found = []
    counts = {name: len(method.skipped) for name, method in _named(reference, methods).items() if method.skipped}
    if counts:
        found.append(f"Skipped: {', '.join(f'{count} of {name}' for name, count in counts.items())}.")
    found += rate_remarks(reference, methods)
    if by_name := [name for name, method in methods.items() if method.steps_by_name]:
        found.append(f"The steps are those in the name, not in the files, for {', '.join(by_name)}.")
    if without := [name for name, method in methods.items() if method.steps is None]:
        found.append(f"Not in the picture, because nothing says their steps: {', '.join(without)}.")
    return found


def settings(reference: Method, methods: Mapping[str, Method]) -> str:
    """A line for each method: what its samples say alike, their seeds and their frame rate."""
    lines = [f"- the reference: {rate(reference.fps)} frames a second"]
    for name, method in methods.items():
        seeds = "seeds unknown" if method.seeds is None else f"seeds {method.seeds}"
        lines.append(f"- {name}: {', '.join([*_said(method), seeds, f'{rate(method.fps)} frames a second'])}")
    return "\n".join(lines)


def differences(
    methods: Mapping[str, Method], found: Sequence[Difference], columns: Sequence[Column], resamples: int
) -> str:
    """Every method less the first, those that have no interval with it less another; and in words what has none."""
    titles = {column.key for column in columns}
    known = [each for each in found if each.column in titles]
    pairs = {pair for each in known for pair in ((each.method, each.less), (each.less, each.method))}
    parts, left, first = list[str](), list(methods), ""
    while base := next((name for name in methods if any((name, other) in pairs for other in left)), ""):
        others = [name for name in left if (base, name) in pairs]
        parts.append(_less(base, others, known, columns))
        left = [name for name in left if name not in (base, *others)]
        if not first:
            first, apart = base, [name for name in methods if name not in (base, *others)]
    if not first:
        return f"There are no intervals: {_why_not(methods, resamples)}."
    if apart:
        parts.append(f"There are no intervals of {', '.join(apart)} less {first}: {_why_not(methods, resamples)}.")
    return "\n\n".join(parts)


def _less(base: str, others: Sequence[str], found: Sequence[Difference], columns: Sequence[Column]) -> str:
    """A table of methods less one of them, in bold where 0 lies outside."""
    by_key = {column.key: column for column in columns}
    rows: dict[str, dict[str, str]] = {name: {} for name in others}
    for each in found:
        other = each.less if each.method == base else each.method
        if base not in (each.method, each.less) or other not in rows:
            continue
        sign, column = -1 if each.method == base else 1, by_key[each.column]
        values = sorted(sign * value for value in each.interval[1:])
        text = f"{column.format(sign * each.interval.estimate)} ({' to '.join(map(column.format, values))})"
        rows[other][column.title] = f"**{text}**" if each.is_clear else text
    shown = [column.title for column in columns if any(column.title in cells for cells in rows.values())]
    drawn = sorted(
        {
            each.resamples
            for each in found
            if base in (each.method, each.less) and {each.method, each.less} & rows.keys()
        }
    )
    about = (
        f"Each method less {base}, with the 95 % interval of the paired difference over captions (resampled "
        f"{' or '.join(map(str, drawn))} times); bold where 0 lies outside. It holds for these captions and these "
        "weights: another training may differ by more."
    )
    return f"{about}\n\n{table(list(rows.items()), shown)}"


def _why_not(methods: Mapping[str, Method], resamples: int) -> str:
    if resamples < 2:
        return f"--resamples was {resamples}"
    if max(method.num_captions for method in methods.values()) < 2:
        return "there is one caption, and intervals are over captions"
    return (
        "the features of the methods that were measured earlier are not in `features` any more; measure all of them in"
        " one call"
    )


def skipped(reference: Method, methods: Mapping[str, Method]) -> str:
    """What could not be read, with the reasons; how many of each set comes first."""
    parts = []
    for name, method in _named(reference, methods).items():
        if method.skipped:
            lines = [f"- {name}: {file}: {reason}" for file, reason in method.skipped.items()]
            parts.append("\n".join([f"{len(lines)} of {name}:", "", *lines]))
    return "\n\n".join(parts)


def _named(reference: Method, methods: Mapping[str, Method]) -> dict[str, Method]:
    return {"the reference": reference, **methods}
