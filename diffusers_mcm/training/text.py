"""Texts of a run: those seen last wait in host memory until they are used again, and are not encoded anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..base_models.precision import no_autocast
from ..conditioning import Conditioning

# All that a training asks of texts: the captions of a batch -> their condition, on the device of the denoiser. Who has
# encoded them before needs no text encoder, and gives `TrainingNetworks` another function of this type.
EncodeTexts = Callable[[Sequence[str]], Conditioning]

CAPACITY = 4 * 2**30  # bytes of encodings in host memory: some ten thousand captions of either kind of teacher


class CachedTextEncoder:
    """Encodings of the captions seen last, each made by itself: its bits depend on no batch it came in.

    `encode` makes the condition of a list of captions. It is kept in host memory, without the rows of zeros at its end
    (Wan pads to 512 rows with them), and comes back whole on `device`, bit for bit; `capacity` is how many bytes are
    kept, but for the last one, which always is. `weights` is open while captions are asked for.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Conditioning],
        capacity: int = CAPACITY,
        device: torch.device | str = "cpu",
        weights: AbstractContextManager[Any] | None = None,
    ):
        self.encode, self.capacity = encode, capacity
        self.device, self.weights = torch.device(device), weights or nullcontext()
        self.rows: OrderedDict[str, dict[str, Kept]] = OrderedDict()  # the one that was used last is at the end
        self.size = 0

    def row(self, caption: str) -> dict[str, Kept]:
        """The encoding of one caption as it is kept, encoded if it is not there."""
        if caption in self.rows:
            self.rows.move_to_end(caption)
            return self.rows[caption]
        row = {key: Kept.of(x) for key, x in self.encode([caption]).items()}
        self.rows[caption] = row
        self.size += nbytes_of(row)
        while self.size > self.capacity and len(self.rows) > 1:
            self.size -= nbytes_of(self.rows.popitem(last=False)[1])
        return row

    @torch.no_grad()
    def encoded(self, caption: str) -> dict[str, Kept]:
        """The encoding of one caption as it is kept."""
        with self.weights, no_autocast(self.device.type):
            return self.row(caption)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Captions -> their embeddings, stacked in order."""
        # Outside autocast: the bits are to depend as little on who asks first, the training or a validation clip.
        with self.weights, no_autocast(self.device.type):
            rows = [self.row(caption) for caption in captions]
        return stack_rows(rows, self.device)


class Kept(NamedTuple):
    """A tensor of one caption in host memory: `(n, …)` of the `(1, length, …)` that it was, the other rows zeros."""

    rows: torch.Tensor
    length: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Kept:
        whole = tensor[0].cpu()
        if tensor.ndim < 3:
            return cls(whole, len(whole))
        real = whole.flatten(1).any(1).nonzero().flatten()
        count = int(real[-1]) + 1 if len(real) else 0
        return cls(whole[:count].clone(), len(whole))  # a view would keep all rows

    @staticmethod
    def stack(kept: list[Kept], device: torch.device) -> torch.Tensor:
        longest = max(len(each.rows) for each in kept)
        filled = [F.pad(each.rows, _after(each.rows, longest)) for each in kept]
        stacked = torch.stack(filled).to(device)
        return F.pad(stacked, _after(stacked[0], kept[0].length))


def nbytes_of(row: dict[str, Kept]) -> int:
    """The bytes that the encoding of one caption takes in host memory."""
    return sum(kept.rows.nbytes for kept in row.values())


def stack_rows(rows: Sequence[dict[str, Kept]], device: torch.device) -> Conditioning:
    """The condition of several captions, in their order and whole."""
    return {key: Kept.stack([row[key] for row in rows], device) for key in rows[0]}


def _after(rows: torch.Tensor, length: int) -> list[int]:
    """What `F.pad` takes to add zeros after `rows (n, …)` until there are `length`."""
    return [0, 0] * (rows.ndim - 1) + [0, length - len(rows)]


class Borrowed:
    """The weights of a network that wait in host memory, and are on the device only where they are needed.

    In `with borrowed:` they come when `fetch` is called for the first time, and at its end are gone. They are frozen,
    so nothing is copied back.
    """

    def __init__(self, network: nn.Module, device: torch.device | str):
        self.network, self.device = network.to("cpu").requires_grad_(False), torch.device(device)
        # For each weight on the device where it is, its name there, and what waits in the host's memory.
        self.waiting: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []

    def __enter__(self) -> Borrowed:
        return self

    def fetch(self) -> None:
        if self.waiting:
            return
        fetched: dict[int, torch.Tensor] = {}  # a weight may be in several places
        for module in self.network.modules():
            for table in (cast(dict[str, torch.Tensor | None], module._parameters), module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self.waiting.append((table, name, tensor))
                        if id(tensor) not in fetched:
                            fetched[id(tensor)] = self._moved(tensor)
                        table[name] = fetched[id(tensor)]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(self.device)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved

    def __exit__(self, *exception: object) -> None:
        for table, name, tensor in self.waiting:
            table[name] = tensor
        self.waiting = []


def build_text_encoder(
    encode: Callable[[list[str]], Conditioning], network: nn.Module, device: torch.device, offload: bool
) -> CachedTextEncoder:
    """The texts of a run by `encode`, which computes with `network`; with `offload` that waits in host memory."""
    if not offload:
        return CachedTextEncoder(encode, device=device)
    weights = Borrowed(network, device)

    def fetch_and_encode(captions: list[str]) -> Conditioning:
        weights.fetch()
        return encode(captions)

    return CachedTextEncoder(fetch_and_encode, device=device, weights=weights)
