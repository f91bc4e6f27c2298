"""One call at a time: while a pipeline samples, no other thread samples with it, or changes it.

A call sets the schedule, the guidance and the strength of the LoRAs on objects that pipelines share, when they are
made of each other's components: two calls at once would each make a video that neither was asked for. So a call, and
every verb that changes what a call computes, has the pipeline and all its components for itself, or is refused.

Who uses what is noted down here and not on the objects, so that these can be copied and pickled at any time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Use:
    """The use of one object by one thread."""

    thread: int
    nested: list[bool] = field(default_factory=list)  # verbs (False) and calls, each inside the one before


_uses: dict[int, _Use] = {}  # by the `id` of objects, which their users keep alive
_guard = threading.Lock()  # of the dictionary, held for moments


@contextmanager
def sole_use(pipeline: Any, to_sample: bool) -> Iterator[None]:
    """Have a pipeline and its components for this thread alone; `RuntimeError` if they are in use.

    A verb may be used inside another one or, from a callback, inside a call of the same thread. A call (`to_sample`)
    may be made inside a verb, but not inside another call.
    """
    objects = {"": pipeline} | {name: each for name, each in pipeline.components.items() if each is not None}
    objects = {name: getattr(each, "_orig_mod", each) for name, each in objects.items()}  # what was compiled
    thread = threading.get_ident()
    with _guard:
        for name, each in objects.items():
            use = _uses.get(id(each), _Use(thread))
            through = f" (or another one that shares its {name})" if name else ""
            if use.thread != thread:
                raise RuntimeError(
                    f"Another thread is using this pipeline{through}. Let the threads take turns, with a"
                    " threading.Lock around the calls, or give each a pipeline of its own, with copy.deepcopy(pipe)."
                )
            if to_sample and True in use.nested:
                raise RuntimeError(
                    f"This pipeline is sampling{through}: a callback cannot start another call with it. Use"
                    " copy.deepcopy(pipe), made before."
                )
        for each in objects.values():
            _uses.setdefault(id(each), _Use(thread)).nested.append(to_sample)
    try:
        yield
    finally:
        with _guard:
            for each in objects.values():
                _uses[id(each)].nested.pop()
                if not _uses[id(each)].nested:
                    del _uses[id(each)]


def is_sampling(pipeline: Any) -> bool:
    """Whether a call of the pipeline is under way: for a verb, which needs the sole use, that is from a callback."""
    return id(pipeline) in _uses and True in _uses[id(pipeline)].nested


def one_call(method: Callable, to_sample: bool = True) -> Callable:
    """Decorates `__call__`, which samples with the sole use of the pipeline."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with sole_use(self, to_sample):
            return method(self, *args, **kwargs)

    return call


def alone(*verbs: str) -> Callable[[type], type]:
    """Decorates a class of pipelines: these methods, its own or inherited, need the sole use of the pipeline."""

    def decorate(cls: type) -> type:
        for verb in verbs:
            setattr(cls, verb, one_call(getattr(cls, verb), to_sample=False))
        return cls

    return decorate
