"""The flags by which commands find a LoRA, or the pair of LoRAs for two experts."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def add_place(add: Callable[..., Any], where: str) -> None:
    """Add `--subfolder`, `--weight_name` and `--revision` by `add`, a parser's or group's `add_argument`; `where` says
    of what they are."""
    add("--subfolder", action="append", help=f"where in {where} the LoRA is; twice for a pair")
    add(
        "--weight_name",
        action="append",
        help="the LoRA's file there, where there are several or it has no usual name; twice for a pair, of the high"
        "-noise expert first",
    )
    add("--revision", help="branch, tag or commit on the Hub")


def take_place(arguments: argparse.Namespace) -> None:
    """Have `subfolder` and `weight_name` as `from_pretrained` takes them: one, or two for a pair."""
    for name in ("subfolder", "weight_name"):
        setattr(arguments, name, one_or_pair(getattr(arguments, name), f"--{name}"))


def one_or_pair(values: Sequence[T] | None, flag: str) -> T | list[T] | None:
    """What a flag says that is given once, or twice for the two experts; `ValueError` if it is given more often."""
    if values is None:
        return None
    if len(values) > 2:
        raise ValueError(f"expected {flag} once, or twice for two experts, got it {len(values)} times")
    return values[0] if len(values) == 1 else list(values)
