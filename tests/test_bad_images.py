"""What cannot be used is refused in one line that names the image, what was found, and what would be right."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejob.data.decode import crop_and_resize, decode_image, encode_png
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def rgb16_png() -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2 * 13))) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(saved(RGB, "JPEG"))
    start_of_frame = data.index(b"\xff\xc0")
    data[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


BAD = {
    "text": (b"hello, this is no image", "is no image that can be read; use PNG, JPEG, WebP"),
    "empty": (b"", "is no image that can be read"),
    "truncated PNG": (saved(RGB)[:-2000], "cannot be decoded, it is damaged"),
    "truncated JPEG": (saved(RGB, "JPEG")[:-200], "cannot be decoded, it is damaged"),
    "alpha": (saved(RGB.convert("RGBA")), "has an alpha channel; remove it"),
    "grey alpha": (saved(RGB.convert("LA")), "has an alpha channel"),
    "transparent palette": (saved(RGB.quantize(8), transparency=0), "has an alpha channel"),
    "alpha WebP": (saved(Image.new("RGBA", (4, 4), (1, 2, 3, 4)), "WEBP", lossless=True), "has an alpha channel"),
    "16-bit grey": (saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)), "has 16 bits per channel"),
    "16-bit RGB": (rgb16_png(), "has 16 bits per channel; convert it to 8 bits"),
    "CMYK": (saved(RGB.convert("CMYK"), "JPEG"), "has CMYK colours; convert it to RGB or grey"),
    "CMYK TIFF": (saved(RGB.convert("CMYK"), "TIFF"), "has CMYK colours"),
    "floating point": (saved(RGB.convert("F"), "TIFF"), "has F colours"),
    "animation": (saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), "holds 2 frames"),
    "bomb": (huge_png(9_000), "has 9000 x 9000 pixels; at most 64,000,000 are decoded"),
    "bomb that Pillow warns of": (huge_png(12_000), "pixels; at most 64,000,000 are decoded"),
    "bomb that Pillow refuses": (huge_png(60_000), "pixels; at most 64,000,000 are decoded"),
    "JPEG bomb": (huge_jpeg(), "has 60000 x 60000 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_used_is_named(kind, tmp_path: Path):
    data, says = BAD[kind]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0-good.png").write_bytes(saved(RGB))
    (tmp_path / "in" / "1-bad.png").write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        pack(str(tmp_path / "in"), str(tmp_path / "out"))
    assert str(caught.value).startswith("1-bad.png ")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (RGB.resize((30, 40)), r"1.png is 3 x 40 x 30 .*0.png is 3 x 40 x 40 .*use --size N to crop and resize"),
        (RGB.convert("L"), r"1.png is 1 x 40 x 40 .*0.png is 3 x 40 x 40 .*convert them all to grey or all to RGB"),
    ],
)
def test_another_shape_than_the_first_is_refused(image, says, tmp_path):
    RGB.save(tmp_path / "0.png")
    image.save(tmp_path / "1.png")
    with pytest.raises(DataError, match=says):
        pack(str(tmp_path), str(tmp_path / "out"))


def test_arrays_that_are_no_images_are_refused():
    with pytest.raises(DataError, match=r"noise is float64 \[2, 1, 4, 4\]; images must be uint8 \[N, C, H, W\]"):
        ArraySource("noise", np.zeros((2, 1, 4, 4)), ["a", "b"])
    with pytest.raises(DataError, match=r"has 1 keys for 2 images"):
        ArraySource("noise", np.zeros((2, 1, 4, 4), dtype=np.uint8), ["a"])
    with pytest.raises(DataError, match=r"00000000 has 4 channels; it must have 1 \(grey\) or 3 \(RGB\)"):
        pack(ArraySource("noise", np.zeros((2, 4, 4, 4), dtype=np.uint8)), "memory://four-channels")


@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_those_that_pillow_decodes(mode, options):
    data = saved(RGB.resize((67, 93)).convert(mode), "JPEG", **options)
    pillow = np.asarray(Image.open(io.BytesIO(data)))
    expected = pillow[np.newaxis] if mode == "L" else pillow.transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(data, "key"), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_give_back_their_pixels(kind):
    data = saved(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode_image(data, "key"), PIXELS.transpose(2, 0, 1))


def test_palettes_become_rgb_and_bits_become_grey():
    few = RGB.quantize(8)
    np.testing.assert_array_equal(decode_image(saved(few), "key"), np.asarray(few.convert("RGB")).transpose(2, 0, 1))
    bits = RGB.convert("1")
    np.testing.assert_array_equal(decode_image(saved(bits), "key"), np.asarray(bits.convert("L"))[np.newaxis])


def test_decoding_is_the_same_from_many_threads():
    files = [saved(RGB.rotate(i), kind) for i in range(40) for kind in ("PNG", "JPEG")]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, "key", shape=(3, 40, 40)), files))
    for data, image in zip(files, together, strict=True):
        np.testing.assert_array_equal(image, decode_image(data, "key"))


def test_the_shape_that_a_reader_asks_for_is_checked():
    with pytest.raises(DataError, match=r"key is 3 x 40 x 40 .*; it must be 1 x 28 x 28"):
        decode_image(saved(RGB), "key", shape=(1, 28, 28))


def test_shrinking_by_a_whole_factor_averages_boxes():
    image = np.random.default_rng(0).integers(0, 64, (1, 8, 12), dtype=np.uint8) * 4  # sums of 4 divide by 4
    centre = image[:, :, 2:10].reshape(1, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(crop_and_resize(image, 4), centre.round())
    np.testing.assert_array_equal(crop_and_resize(image, 8), image[:, :, 2:10])
    assert crop_and_resize(image, 5).shape == (1, 5, 5)


def test_png_of_pixels_gives_back_the_pixels():
    for image in (PIXELS.transpose(2, 0, 1), PIXELS.transpose(2, 0, 1)[:1]):
        np.testing.assert_array_equal(decode_image(encode_png(image), "key"), image)
