"""The text that the discriminator sees beside a real image: never one that gives the image away.

Where real images have texts that generated ones do not have, the discriminator need not look at a picture: among texts
with the shares p among real and q among generated images, the hinge loss may fall to 2 Σ min(p, q) by itself.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

IMAGE_TEXTS = ("auto", "own", "prompt", "none")
ALIKE = 0.9  # overlap of two caption sets from which on they count as alike: the hinge cannot fall below 1.8


class ImageText(NamedTuple):
    """The text of real images, as decided for a run."""

    choice: str  # "own", "prompt" or "none", as for `pair_texts`; "auto" where there is no discriminator
    reason: str  # a clause for the log
    overlap: float | None = None  # of the captions of images and videos; None if they were not compared

    @property
    def warning(self) -> str | None:
        """What the discriminator may hold on to instead of the appearance of the images; None if nothing."""
        if self.choice == "own" and self.overlap is not None and self.overlap < ALIKE:
            return (
                "With --image_text own the discriminator can tell real from generated images by their texts alone:"
                f" its loss may fall to {2 * self.overlap:.2f} without a look at them. With --image_text auto neither"
                " would have a text."
            )
        if self.choice == "prompt":
            return (
                "With --image_text prompt the real images do not show their texts: the discriminator learns that an "
                "image which does is a generated one. --image_text auto would not teach it that."
            )
        return None


def caption_overlap(images: Iterable[str], videos: Iterable[str]) -> float:
    """Σ min(p, q) of the captions' shares p and q: 1 if both hold the same, equally often, 0 if they share none."""
    own, prompts = Counter(images), Counter(videos)
    num_own, num_prompts = own.total(), prompts.total()
    return sum(min(own[text] / num_own, prompts[text] / num_prompts) for text in own.keys() & prompts.keys())


def pair_texts(choice: str, prompts: Sequence[str], captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts of generated images and of the real ones that they are paired with.

    With "own" a real image has its own caption; if that is "", neither image of the pair has a text. With "prompt" it
    has the prompt of its pair, and with "none" neither image has a text.
    """
    if choice == "none":
        return [""] * len(prompts), [""] * len(prompts)
    if choice == "prompt":
        return list(prompts), list(prompts)
    if choice != "own":
        raise ValueError(f"Expected one of the rules own, prompt and none, got {choice!r}.")
    # As many generated images as real ones are then without a text, whatever their prompts.
    return [prompt if caption else "" for prompt, caption in zip(prompts, captions, strict=True)], list(captions)
