"""Names that were elsewhere once, found where they are now."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def moved(module: str, name: str, places: Mapping[str, str]) -> Any:
    """What `module.__getattr__(name)` gives, where `places` says in which module each name is now.

    Imported only when it is asked for, so that nothing depends on what has moved away from it.
    """
    if name in places:
        return getattr(import_module(places[name]), name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
