"""Which text real images get in a run, decided from the captions of its data sets."""

import logging

from ..data import KeyedDataset
from ..data.sources import MediaRows
from ..distillation.image_text import ALIKE, ImageText, caption_overlap

logger = logging.getLogger(__name__)
MAX_COMPARED = 1_000_000  # rows of a data set whose captions are compared, which takes seconds


def choose_image_text(asked: str, images: KeyedDataset | None, videos: KeyedDataset) -> ImageText:
    """The text that `--image_text` asks for; "auto" takes "own" where the two caption sets are alike, else "none".

    It depends on the captions of the data sets alone, so all processes come to the same, and so does a resumed run.
    """
    if images is None:
        return ImageText(asked, "no images are looked at")
    overlap, finding = _compare(images.rows, videos.rows)
    if asked != "auto":
        return ImageText(asked, f"as --image_text says; {finding}", overlap)
    alike = overlap is not None and overlap >= ALIKE
    return ImageText("own" if alike else "none", finding, overlap)


def tell(text: ImageText) -> None:
    """Log which text real images get in this run, and why."""
    logger.info("Text beside real images: %s (%s).", text.choice, text.reason)
    if text.warning:
        logger.warning(text.warning)


def _compare(images: MediaRows, videos: MediaRows) -> tuple[float | None, str]:
    """The overlap of the captions, those of images without one left out, and what was found, in words."""
    if images is videos:
        return 1.0, "images are frames of the videos"
    if max(len(images), len(videos)) > MAX_COMPARED:
        return None, f"captions of more than {MAX_COMPARED:,} items are not compared"
    captions = [caption for caption in images.all_captions() if caption]
    if not captions:
        return None, "images have no captions"
    overlap = caption_overlap(captions, videos.all_captions())
    missing = len(images) - len(captions)
    without = f", {missing} of {len(images)} images have none" if missing else ""
    return overlap, f"captions of images and videos overlap by {overlap:.0%}{without}"
