"""The files of a cache: what was encoded of clips and of texts, in safetensors that are read where they lie."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..conditioning import Conditioning
from ..lora import write_safetensors
from .text import Kept, stack_rows

SHARD_BYTES = 2**28  # of the tensors in one file: what a run that is killed has to encode again
_OPEN_FILES = 64  # by each process
_LEFT_OVER = 60.0  # seconds after which a half-written file that nobody writes to is one of a killed run


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file that is mapped into memory, and what its metadata say."""
    try:
        file = safe_open(path, "pt")
        return file, {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} of the cache is damaged ({error}). Remove it: what was in it is encoded again."
        ) from error


def _write(path: Path, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    write_safetensors(path, tensors, {name: json.dumps(value) for name, value in metadata.items()}, synced=True)


def clear_up(folder: Path) -> None:
    """Remove what killed runs left half-written; what another one is writing just now stays."""
    for path in folder.glob(".*.safetensors.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _LEFT_OVER:
                path.unlink()


class ClipStore:
    """Encoded clips by number, from 0 to `total` - 1, in the files `clips-*.safetensors` of a folder.

    A file's name tells which clips are in it, so that none is ever replaced by one with others, whoever writes it.

    A file has "index" int64 (n,), the clips' numbers, "mean" and "deviation" (n, C, T, h, w) as
    `BaseModel.encode_posterior` gives them, and "frames" uint8 (n, l, 3, H, W) where there are judged frames. The
    captions are in its metadata.
    """

    def __init__(self, folder: Path, total: int):
        self.folder, self.files = folder, []  # type: tuple[Path, list[Path]]
        self.file_of = np.full(total, -1, dtype=np.int32)  # by number, into `files`; -1 where there is no such clip
        self.row_of = np.zeros(total, dtype=np.int32)
        self.refresh()

    def refresh(self) -> None:
        """Take note of files that were written meanwhile, by other processes too."""
        known = set(self.files)
        for path in sorted(self.folder.glob("clips-*.safetensors")):
            if path not in known:
                index = _open(path)[0].get_tensor("index").numpy()
                rows = np.flatnonzero(index < len(self.file_of))
                self.file_of[index[rows]], self.row_of[index[rows]] = len(self.files), rows
                self.files.append(path)

    def __contains__(self, number: int) -> bool:
        return bool(self.file_of[number] >= 0)

    def missing(self, wanted: int) -> list[int]:
        """Those of the first `wanted` clips that are not there."""
        return np.flatnonzero(self.file_of[:wanted] < 0).tolist()

    def captions(self, wanted: int) -> set[str]:
        """The captions of those of the first `wanted` clips that are there."""
        found: set[str] = set()
        for number, path in enumerate(self.files):
            rows = self.row_of[:wanted][self.file_of[:wanted] == number]
            captions = _open(path)[1]["captions"]
            found.update(captions[row] for row in rows.tolist())
        return found

    def read(self, number: int, latents: bool = True, frames: bool = True) -> dict[str, Any]:
        """ "caption", "mean" and "deviation" of one clip, and "frames" where asked for; without `latents` zeros.

        KeyError if there is no such clip.
        """
        if number not in self:
            raise KeyError(f"The cache {self.folder} has no clip {number}.")
        file, said = _open(self.files[self.file_of[number]])
        row = int(self.row_of[number])
        item: dict[str, Any] = {"caption": said["captions"][row]}
        for name in ("mean", "deviation"):
            kept = file.get_slice(name)
            # of zeros the type alone is asked for, by a slice of nothing
            item[name] = kept[row] if latents else torch.zeros(kept.get_shape()[1:], dtype=kept[0:0].dtype)
        return item | ({"frames": file.get_slice("frames")[row]} if frames else {})

    def write(self, clips: Sequence[Mapping[str, Any]]) -> None:
        """Keep clips, each with the "index" that is its number, and what `read` gives of it, in one file."""
        names = [name for name in clips[0] if name not in ("index", "caption")]
        tensors = {name: torch.stack([clip[name] for clip in clips]).contiguous() for name in names}
        index = torch.tensor([clip["index"] for clip in clips])
        path = self.folder / f"clips-{int(index[0]):09d}-{_digest(repr(index.tolist()))[:8]}.safetensors"
        _write(path, {"index": index, **tensors}, captions=[clip["caption"] for clip in clips])


class TextStore:
    """Encoded texts in the files `KIND-*.safetensors` of a folder, without the rows of zeros at their ends.

    A file's name tells which texts are in it.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.places: dict[str, Path] = {}  # by the text's digest
        self.refresh()

    def refresh(self) -> None:
        """Take note of files that were written meanwhile."""
        for path in sorted(self.folder.glob(f"{self.kind}-*.safetensors")):
            self.places |= dict.fromkeys(_open(path)[1]["texts"], path)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that are not there, each once and in order."""
        return sorted(text for text in set(texts) if _digest(text) not in self.places)

    def read(self, text: str) -> dict[str, Kept]:
        """The encoding of a text; ValueError if there is none."""
        digest = _digest(text)
        if digest not in self.places:
            raise ValueError(
                f"The cache {self.folder} has no encoding of {text!r} ({self.kind}). `diffusers-mcm encode` with the"
                " flags of this run adds it."
            )
        file, said = _open(self.places[digest])
        return {name: Kept(file.get_tensor(f"{digest}.{name}"), length) for name, length in said["lengths"].items()}

    def write(self, texts: Mapping[str, dict[str, Kept]]) -> None:
        """Keep the encodings of texts, in one file."""
        kept = {_digest(text): encoding for text, encoding in texts.items()}
        encoding = next(iter(kept.values()))
        rows = ((digest, name, each.rows) for digest, of in kept.items() for name, each in of.items())
        tensors = {f"{digest}.{name}": tensor.contiguous() for digest, name, tensor in rows}
        path = self.folder / f"{self.kind}-{_digest(' '.join(kept))}.safetensors"
        _write(path, tensors, texts=list(kept), lengths={name: each.length for name, each in encoding.items()})
        self.places |= dict.fromkeys(kept, path)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class StoredTexts:
    """Encodings of captions out of a store, on `device`; an `EncodeTexts` that needs no network."""

    def __init__(self, store: TextStore, device: torch.device, capacity: int = 1024):
        self.device, self.row = device, lru_cache(capacity)(store.read)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        return stack_rows([self.row(caption) for caption in captions], self.device)


def in_files(items: Iterable[tuple[Any, int]], limit: int = SHARD_BYTES) -> Iterator[list[Any]]:
    """Items, given with their bytes, in lists for one file each: of `limit` bytes, or of one larger item."""
    taken: list[Any] = []
    size = 0
    for item, of_item in items:
        if taken and size + of_item > limit:
            yield taken
            taken, size = [], 0
        taken.append(item)
        size += of_item
    if taken:
        yield taken
