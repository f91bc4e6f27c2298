"""Reading one image, and fitting any picture to the size that training wants."""

import io
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from .faults import UnusableItem, is_remote, unusable
from .remote import read_whole

# What PIL's readers raise for files that are broken in one way or another.
BROKEN_FILE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def media_file(media: dict):
    """What to open for `{"path": str | None, "bytes": bytes | None}`: a path, or a binary file object."""
    if media is not None and media.get("bytes") is not None:
        return io.BytesIO(media["bytes"])
    if (path := open_path(media)) is None:
        raise UnusableItem("the row holds neither a file nor its bytes")
    return read_whole(path) if is_remote(path) else os.path.join(os.curdir, path)  # "red: a.mp4" names no protocol


def open_path(media: dict) -> str | None:
    """The path that `media_file` opens; None where the bytes are in memory."""
    return media.get("path") if media is not None and media.get("bytes") is None else None


def fit(image: Image.Image, height: int, width: int, pixel_aspect: float = 1.0) -> Image.Image:
    """Scale the shortest side to the target and crop the centre (antialiased bicubic).

    Both happen in one resampling of the central box, so that no size in between is rounded to whole pixels.
    `pixel_aspect` is the width of the image's pixels in heights; the target's pixels are square.
    """
    scale = min(image.width * pixel_aspect / width, image.height / height)  # source lines per target pixel
    box_width, box_height = min(width * scale / pixel_aspect, image.width), min(height * scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    right, bottom = min(left + box_width, image.width), min(top + box_height, image.height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _deep_gray(image: Image.Image) -> np.ndarray:
    """Brightness in [0, 1] of a gray image with more than 8 bits per pixel: float64 (H, W)."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UnusableItem("its floating-point values are not all between 0 (black) and 1 (white)")
    elif image.mode.startswith("I;16"):
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        values /= 2**bits - 1
    elif image.format in ("PNG", "PPM"):  # formats of at most 16 bits, which some versions of PIL open as "I"
        values /= 65535
    else:
        raise UnusableItem(f"its {image.format} values are 32-bit integers, of which nobody can say which is white")
    return 1 - values if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else values


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image mode to sRGB; what is transparent becomes white, as a browser would show it."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # of which PIL would clip what is over 255
        levels = np.rint(np.clip(_deep_gray(image), 0, 1) * 255).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            levels[np.asarray(image) == transparent] = 255
        image = Image.fromarray(levels)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("RGB", "CMYK", "L"):
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise UnusableItem(f"its colours ({image.mode}) cannot be converted: {error}") from error
    if profile:
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        with suppress(ImageCms.PyCMSError, OSError):  # one that does not fit is left aside, as browsers do
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def read_image(media: dict, height: int, width: int) -> np.ndarray:
    """Decode one image with PIL, upright and fitted: uint8 (H, W, 3). Of an animation it is the first picture.

    `UnusableItem` if the file is missing or broken, or holds numbers of which nobody can say how bright they are.
    """
    try:  # PIL's code only, whose complaints are about the file
        with Image.open(media_file(media)) as image:
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*BROKEN_FILE, MemoryError) as error:
        raise unusable(error, open_path(media), "the image") from error
    rgb = to_rgb(image)
    rgb.info.clear()  # or PIL reads the whole EXIF block again, which may be broken
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(fit(ImageOps.exif_transpose(rgb), height, width))
