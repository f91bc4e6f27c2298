"""The caption grammar of the shapes world, and which captions no training may read."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

# RGB, 0-255
COLOURS = {
    "red": (230, 25, 25),
    "green": (25, 180, 50),
    "blue": (40, 65, 240),
    "yellow": (240, 215, 25),
    "purple": (150, 40, 205),
    "orange": (255, 130, 15),
}
SHAPES = ("circle", "square", "triangle", "ring")
# unit displacement (x to the right, y downwards); growing and shrinking stay in place
MOTIONS = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "growing": (0, 0),
    "shrinking": (0, 0),
}
BACKGROUNDS = {"black": (13, 13, 13), "white": (242, 242, 242), "gray": (128, 128, 128), "cyan": (100, 215, 230)}
TEMPLATE = "a {colour} {shape} {motion} on a {background} background"
_WORDS: dict[str, Iterable[str]] = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}


class Caption(NamedTuple):
    """The four attributes of one caption; `str()` gives the sentence."""

    colour: str
    shape: str
    motion: str
    background: str

    def __str__(self) -> str:
        return TEMPLATE.format(**self._asdict())


def grammar() -> dict[str, str | dict[str, list[str]]]:
    """The grammar as a model's `grammar.json` holds it, for `diffusers-mcm generate` to tell what the model draws."""
    return {"template": TEMPLATE, "words": {name: list(words) for name, words in _WORDS.items()}}


def parse(caption: "str | Caption") -> Caption:
    """Read a caption of the grammar; `ValueError` if the sentence is not one of its 576."""
    if (sentence := str(caption)) not in _BY_SENTENCE:
        form = TEMPLATE.format(**{name: f"{{{'|'.join(words)}}}" for name, words in _WORDS.items()})
        raise ValueError(f"expected a caption of the form {form!r}, got {sentence!r}")
    return _BY_SENTENCE[sentence]


def all_captions() -> list[Caption]:
    """All 576 captions, in a fixed order."""
    return list(_BY_SENTENCE.values())


def held_out(caption: "str | Caption") -> bool:
    """Whether the caption is kept out of every training (60 of 576 are)."""
    return int(hashlib.sha256(str(caption).encode()).hexdigest(), 16) % 10 == 0


def training_captions() -> list[Caption]:
    """The 516 captions that training may read."""
    return [caption for caption in all_captions() if not held_out(caption)]


def spaced(captions: Sequence[Caption], count: int) -> list[Caption]:
    """So many of the captions, evenly spaced."""
    return [captions[index] for index in np.linspace(0, len(captions) - 1, count).round().astype(int)]


def held_out_captions() -> list[Caption]:
    """The 60 captions on which every figure is measured."""
    return [caption for caption in all_captions() if held_out(caption)]


_BY_SENTENCE = {str(caption): caption for caption in map(Caption._make, product(*_WORDS.values()))}
