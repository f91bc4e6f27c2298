"""Counts how often files are opened to be read."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import safetensors

_watching: list[Counter] = []


def _opened(event, arguments):
    if event == "open" and _watching and isinstance(arguments[0], (str, Path)) and "r" in str(arguments[1]):
        _watching[-1].update((Path(arguments[0]).name, str(arguments[0])))


sys.addaudithook(_opened)  # there is no way to remove one


@contextmanager
def reads():
    """How often each file is opened to be read, by its name and by its path."""
    original, found = safetensors.safe_open, Counter()

    def counted(path, *args, **kwargs):
        found.update((Path(path).name, str(path)))
        return original(path, *args, **kwargs)

    _watching.append(found)
    try:
        with mock.patch.object(safetensors, "safe_open", counted):
            yield found
    finally:
        _watching.pop()
