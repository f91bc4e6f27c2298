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
    words: tuple[Iterable[str], ...] = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    return {"template": TEMPLATE, "words": {name: list(choices) for name, choices in zip(Caption._fields, words)}}


def parse(caption: "str | Caption") -> Caption:
    """Read a caption of the grammar.

    Raises:
        ValueError: if the sentence is not one of the grammar's 576.
    """
    try:
        return _BY_SENTENCE[str(caption)]
    except KeyError:
        raise ValueError(
            f"expected a caption of the form 'a {{{'|'.join(COLOURS)}}} {{{'|'.join(SHAPES)}}} "
            f"{{{'|'.join(MOTIONS)}}} on a {{{'|'.join(BACKGROUNDS)}}} background', got {str(caption)!r}"
        ) from None


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


_BY_SENTENCE = {str(c): c for c in (Caption(*words) for words in product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))}
