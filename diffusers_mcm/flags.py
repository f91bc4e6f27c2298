"""Fields of a configuration that carry all that is said of their command-line flags."""

import dataclasses
from typing import Any


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    group: str,
    choices: tuple | None = None,
    many: bool = False,
    secret: bool = False,
):
    """A dataclass field that carries what its command-line flag needs."""
    metadata = {"help": help, "group": group, "choices": choices, "many": many}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)
