"""Pictures of every depth, mode and orientation; what is broken is skipped with a reason."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from diffusers_mcm.data.faults import MachineError, UnusableItem
from diffusers_mcm.data.images import fit, read_image

RAMP = np.tile(np.linspace(0, 255, 96), (64, 1))


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(data, height=64, width=96):
    return read_image({"path": None, "bytes": data}, height, width).astype(int)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray((RAMP * 257).astype(np.uint16))),
        saved(Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF"),
        saved(Image.fromarray((RAMP * 257).astype(">u2")), "TIFF"),
        saved(Image.fromarray((255 - RAMP).astype(np.uint8) * np.uint16(257)), "TIFF", tiffinfo={262: 0}),
        saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.uint8))),
        saved(Image.fromarray(RAMP.astype(np.uint8)).convert("LA")),
    ],
    ids=["png16", "tiff16", "tiff16 big-endian", "tiff16 white is zero", "float", "png8", "gray and alpha"],
)
def test_a_gray_ramp_is_a_gray_ramp(data):
    assert np.abs(read(data).mean(-1) - RAMP).max() <= 1.5


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.float32([[0.0, 2.0]]), "not all between 0 .black. and 1 .white."),
        (np.float32([[0.0, np.nan]]), "not all between"),
        (np.int32([[0, 70000]]), "32-bit integers, of which nobody can say which is white"),
    ],
)
def test_numbers_without_a_white_are_refused(pixels, reason):
    with pytest.raises(UnusableItem, match=reason):
        read(saved(Image.fromarray(pixels), "TIFF"))


def test_what_is_transparent_is_white_in_every_mode():
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = Image.new("P", (8, 8), 3)
    deep = Image.fromarray(np.full((8, 8), 500, np.uint16))
    for data in (saved(clear), saved(palette, "GIF", transparency=3), saved(deep, transparency=500)):
        assert (read(data, 8, 8) == 255).all()


def test_other_modes_and_the_first_picture_of_an_animation():
    assert np.abs(read(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8, 8) - [255, 0, 0]).max() <= 4
    assert (read(saved(Image.new("1", (8, 8), 1)), 8, 8) == 255).all()
    frames = [
        Image.new(
            "P",
            (8, 8),
            0,
        ).convert("RGB"),
        Image.new("RGB", (8, 8), "white"),
    ]
    for format in ("GIF", "WEBP"):
        assert (read(saved(frames[0], format, save_all=True, append_images=frames[1:]), 8, 8) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    turned = {2: pixels[:, ::-1], 3: np.rot90(pixels, 2), 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turned |= {6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(saved(Image.fromarray(pixels), exif=exif), 16, 16), turned.get(orientation, pixels))


def test_colours_follow_the_profile_and_a_broken_one_is_left_aside():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"broken", lab_like):
        assert np.abs(read(saved(image, icc_profile=profile), 8, 8) - [200, 100, 50]).max() <= 1
    swapped = srgb.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")
    red, green, _ = read(saved(image, icc_profile=swapped), 8, 8)[0, 0]
    assert green > red  # a profile whose first colour is green


def test_a_huge_text_chunk_is_skipped_with_its_reason():
    text = PngInfo()
    text.add_itxt("workflow", "x" * 3_000_000, zip=True)
    with pytest.raises(UnusableItem, match="cannot be read .ValueError: Decompressed data too large"):
        read(saved(Image.new("RGB", (8, 8)), pnginfo=text))


def test_a_decompression_bomb_is_skipped(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnusableItem, match="DecompressionBombError"):
        read(saved(Image.new("RGB", (8, 8))))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_whatever_is_broken_is_unusable_or_read(format):
    data = saved(Image.fromarray(RAMP.astype(np.uint8)).convert("RGB"), format)
    random = np.random.default_rng(0)
    for trial in range(60):
        broken = bytearray(data[: random.integers(1, len(data))] if trial % 3 == 0 else data)
        for place in (len(broken) * random.random(1 + trial % 8) ** 3).astype(int):
            broken[place] = random.integers(0, 256)
        try:
            assert read(bytes(broken), 8, 8).shape == (8, 8, 3)
        except UnusableItem as error:
            assert "cannot be read" in str(error) or "values" in str(error)


def test_lack_of_memory_is_not_the_files_fault(monkeypatch):
    def out_of_memory(*args):
        raise MemoryError

    monkeypatch.setattr(Image, "open", out_of_memory)
    with pytest.raises(MachineError, match="MemoryError"):
        read(b"")


def test_fit_takes_the_shape_of_the_pixels_into_account():
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    wide = image.resize((128, 48), Image.Resampling.BICUBIC)
    assert fit(image, 24, 32, 2.0).size == (32, 24)
    difference = np.asarray(fit(image, 24, 24, 2.0)).astype(int) - np.asarray(fit(wide, 24, 24)).astype(int)
    assert np.abs(difference).mean() < 2
