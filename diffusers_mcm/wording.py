"""How names and sizes are put into what a reader is told."""

from collections.abc import Iterable


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, in their order, and whether there are more: a, b, c, …"""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def readable(size: float) -> str:
    """Bytes for a reader: 1.23 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
