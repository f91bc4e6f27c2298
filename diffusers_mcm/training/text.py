"""Frozen text encoders run once per distinct caption."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from ..conditioning import Conditioning


class CachedTextEncoder:
    """Encodings of the captions seen last, each made by itself: its bits do not depend on the batch it came in.

    Args:
        encode: list of captions -> tensors, all of them batch-first.
        capacity: how many captions to keep; the one unused for longest goes first.
    """

    def __init__(self, encode: Callable[[list[str]], Conditioning], capacity: int = 1024):
        self.encode, self.capacity = encode, capacity
        self.cache: OrderedDict[str, Conditioning] = OrderedDict()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Captions -> their embeddings, stacked in order."""
        rows = [self._lookup(caption) for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _lookup(self, caption: str) -> Conditioning:
        if caption in self.cache:
            self.cache.move_to_end(caption)
            return self.cache[caption]
        self.cache[caption] = row = self.encode([caption])
        if len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return row
