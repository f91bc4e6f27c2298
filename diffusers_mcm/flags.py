"""Configurations whose fields carry all that is said of their command-line flags."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FIXED, TOLD = "fixed", "told"
_BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (operator.gt, "greater than {:g}"),
    "least": (operator.ge, "{:g} or more"),
    "below": (operator.lt, "below {:g}"),
    "most": (operator.le, "{:g} or less"),
}


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    group: str,
    choices: tuple | None = None,
    many: bool = False,
    filled: bool = False,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    resume: str | None = None,
    before: Any = None,
    formerly: str | None = None,
    source: bool = False,
    recorded: bool = True,
    secret: bool = False,
    beyond_paper: bool = False,
) -> Any:
    """A dataclass field that carries all that is said of its flag.

    Args:
        help, group: What the command line says of it, and under which title.
        choices, many: The values it may have; whether it takes any number of them.
        filled: The text must not be empty.
        above, least, below, most: The bounds of the number, exclusive or inclusive.
        resume: `FIXED` if a run with another value would not be the same run, `TOLD` if a change is warned of.
        before: What was done before there was such a flag, where that is not what the default says.
        formerly: The flag's old name, which is still read.
        source: The value names a model or a data set: a repository or a path.
        recorded: The value belongs to how a LoRA was made, and goes into its configuration.
        secret: The value is kept out of everything that is written.
        beyond_paper: The paper has no such thing.
    """
    said = {name: value for name, value in locals().items() if name != "default"}
    said["bounds"] = {name: said[name] for name in _BOUNDS if said[name] is not None}
    return dataclasses.field(default=default, metadata=said, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class FlagConfig:
    """A configuration all of whose fields are made by `flag`; a value that its flag rules out is a ValueError."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.metadata["many"]:
                value = tuple(value)
                object.__setattr__(self, entry.name, value)
            for one in value if entry.metadata["many"] else (value,):
                if one is not None or entry.default is not None:
                    _check(entry, one)

    @classmethod
    def names(cls, **said: Any) -> list[str]:
        """The fields of which this is said, as in `TrainingConfig.names(source=True)`, in their order."""
        entries = dataclasses.fields(cls)
        return [e.name for e in entries if all(e.metadata[key] == value for key, value in said.items())]

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded values by the names that their flags have now."""
        now = {entry.metadata["formerly"]: entry.name for entry in dataclasses.fields(cls)}
        return {now.get(name, name): value for name, value in values.items()}


def _check(entry: dataclasses.Field, value: Any) -> None:
    said = entry.metadata
    if said["choices"] and value not in said["choices"]:
        raise ValueError(f"--{entry.name} must be one of {', '.join(map(str, said['choices']))}, not {value!r}.")
    if said["filled"] and not value:
        raise ValueError(f"--{entry.name} must not be empty.")
    bounds = said["bounds"]
    for bound, limit in bounds.items():
        holds, wanted = _BOUNDS[bound]
        if not (math.isfinite(value) and holds(value, limit)):
            between = {"least", "most"} <= bounds.keys()
            wanted = "between {least:g} and {most:g}".format(**bounds) if between else wanted.format(limit)
            raise ValueError(f"--{entry.name} must be {wanted}, not {value}.")
