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
from dataclasses import dataclass
from typing import Any


@dataclass
class _Use:
    """The use of one object by one thread."""

    thread: int
    depth: int = 0  # how many verbs and calls of that thread are under way, each inside the one before
    sampling: bool = False


_uses: dict[int, _Use] = {}  # by the `id` of objects, which their users keep alive
_guard = threading.Lock()  # of the dictionary, held for moments


@contextmanager
def sole_use(pipeline: Any, *, to_sample: bool = False) -> Iterator[None]:
    """Have a pipeline and its components for this thread alone; `RuntimeError` if they are in use.

    A verb may be used inside another one or, from a callback, inside a call of the same thread. A call (`to_sample`)
    may be made inside a verb, but not inside another call.
    """
    objects = _objects(pipeline)
    thread = threading.get_ident()
    with _guard:
        for name, each in objects.items():
            use = _uses.get(id(each))
            if use is not None and use.thread != thread:
                raise RuntimeError(
                    f"Another thread is using this pipeline{_through(name)}. Let the threads take turns, with a"
                    " threading.Lock around the calls, or give each a pipeline of its own, with copy.deepcopy(pipe)."
                )
            if use is not None and use.sampling and to_sample:
                raise RuntimeError(
                    f"This pipeline is sampling{_through(name)}: a callback cannot start another call with it. Use"
                    " copy.deepcopy(pipe), made before."
                )
        for each in objects.values():
            use = _uses.setdefault(id(each), _Use(thread))
            use.depth += 1
            use.sampling |= to_sample
    try:
        yield
    finally:
        with _guard:
            for each in objects.values():
                use = _uses[id(each)]
                use.depth -= 1
                if to_sample:
                    use.sampling = False
                if use.depth == 0:
                    del _uses[id(each)]


def is_sampling(pipeline: Any) -> bool:
    """Whether a call of the pipeline is under way: for a verb, which needs the sole use, that is from a callback."""
    use = _uses.get(id(pipeline))
    return use is not None and use.sampling


def _objects(pipeline: Any) -> dict[str, Any]:
    """A pipeline and its components by their names; of compiled ones what was compiled."""
    named = {"": pipeline} | {name: each for name, each in pipeline.components.items() if each is not None}
    return {name: getattr(each, "_orig_mod", each) for name, each in named.items()}


def _through(name: str) -> str:
    return f" (or another one that shares its {name})" if name else ""


def one_call(method: Callable) -> Callable:
    """Decorates `__call__`, which samples with the sole use of the pipeline."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with sole_use(self, to_sample=True):
            return method(self, *args, **kwargs)

    return call


def alone(*verbs: str) -> Callable[[type], type]:
    """Decorates a class of pipelines: these methods, its own or inherited, need the sole use of the pipeline."""

    def decorate(cls: type) -> type:
        for verb in verbs:
            setattr(cls, verb, _guarded(getattr(cls, verb)))
        return cls

    return decorate


def _guarded(method: Callable) -> Callable:
    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        with sole_use(self):
            return method(self, *args, **kwargs)

    return guarded
