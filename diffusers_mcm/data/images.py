"""Reading one image, and fitting any picture to the size that training wants."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class UnusableItem(Exception):
    """One item of a data set cannot be used; the message says why. The data set replaces it by another."""


def is_remote(path: str) -> bool:
    """Whether `path` is an address (`hf://…`, `https://…`, `zip://…`) and not a file of this machine."""
    return "://" in path


def media_file(media: dict):
    """What to open for `{"path": str | None, "bytes": bytes | None}`: a path, or a binary file object."""
    if media is None or (media.get("bytes") is None and media.get("path") is None):
        raise UnusableItem("the row holds neither a file nor its bytes")
    if media.get("bytes") is not None:
        return io.BytesIO(media["bytes"])
    if is_remote(media["path"]):
        from datasets.utils.file_utils import xopen

        return xopen(media["path"], "rb")
    return media["path"]


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale the shortest side to the target and crop the centre (antialiased bicubic).

    Both happen in one resampling of the central box, so that no size in between is rounded to whole pixels.
    """
    scale = min(image.width / width, image.height / height)  # source pixels per target pixel
    box_width, box_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    right, bottom = min(left + box_width, image.width), min(top + box_height, image.height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image mode to RGB; what is transparent becomes white, as a browser would show it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(media: dict, height: int, width: int) -> np.ndarray:
    """Decode one image with PIL, upright and fitted: uint8 (H, W, 3).

    Raises:
        UnusableItem: if the file is missing or broken.
    """
    try:
        with Image.open(media_file(media)) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(fit(to_rgb(upright), height, width))
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL reports broken PNG chunks as SyntaxError and truncated files as OSError.
        raise UnusableItem(f"the image cannot be read ({type(error).__name__}: {error})") from error
