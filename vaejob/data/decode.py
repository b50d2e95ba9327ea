"""From the bytes of an image file to its pixels, the same pixels on every machine: uint8 [C, H, W], grey or RGB.

JPEG is decoded by libjpeg-turbo's exact transform, plain PNG by libspng, everything else by Pillow. What would have to be guessed at (alpha,
16 bits, CMYK, several frames) is refused. An EXIF orientation is not applied: the pixels are those that were stored.
"""

import io
import struct
import warnings

import numpy as np
import pyspng
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vaejob.errors import DataError

Buffer = bytes | memoryview

MAX_PIXELS = 64_000_000
"""Height x width beyond which an image is refused before it is decoded."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "L", 2: "RGB"}
# No others: some of Pillow's formats start programs or draw vector graphics.
_FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TO_MODE = {"L": "L", "1": "L", "RGB": "RGB", "P": "RGB"}
# Pillow's own limit only warns, and lies above ours.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode_image(data: Buffer, key: str, *, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """The pixels of an image file, uint8 [C, H, W].

    Raises DataError, naming the key, where it cannot be decoded or has not the shape that is asked for.
    """
    pixels = _decoded(data, key, None)
    if shape is not None:
        _check_shape(key, pixels.shape, shape)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_into(data: Buffer, key: str, pixels: np.ndarray) -> None:
    """Decodes an image file into uint8 [H, W, C], contiguous. Raises DataError like `decode_image`."""
    height, width, channels = pixels.shape
    found = _decoded(data, key, pixels)
    if found is not pixels:
        _check_shape(key, found.shape, (channels, height, width))
        pixels[:] = found


def encoding_of(data: Buffer) -> str | None:
    """PNG, JPEG or WEBP, from the first bytes of a file; None for anything else."""
    if data[:3] == _JPEG_MAGIC:
        return "JPEG"
    if data[:8] == _PNG_MAGIC:
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of a grey or RGB image; the same bytes for the same pixels."""
    file = io.BytesIO()
    _to_pillow(image).save(file, "PNG")
    return file.getvalue()


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square, resized to size x size: boxes of whole pixels where they fit, else Lanczos."""
    side = min(image.shape[1:])
    top, left = ((length - side) // 2 for length in image.shape[1:])
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square)
    resampling = Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS
    return _from_pillow(_to_pillow(square).resize((size, size), resampling))


def describe_shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{channels} x {height} x {width} (channels x height x width)"


def _decoded(data: Buffer, key: str, out: np.ndarray | None) -> np.ndarray:
    """The pixels, uint8 [H, W, C]: `out` itself if they could be decoded into it."""
    try:
        magic = bytes(data[:8])
        if magic[:3] == _JPEG_MAGIC:
            return _decode_jpeg(data, key, out)
        if magic == _PNG_MAGIC and (kind := _plain_png(file := bytes(data))) is not None:
            return _decode_png(file, key, kind)
        return _decode_by_pillow(data, key)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{key} is no image that can be read; use PNG, JPEG, WebP, BMP, GIF, TIFF, PGM or PPM"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{key} has too many pixels; at most {MAX_PIXELS:,} are decoded") from error
    except Exception as error:  # decoders raise whatever their parsers stumble over
        raise DataError(f"{key} cannot be decoded, it is damaged: {' '.join(str(error).split())}") from error


def _check_shape(key: str, found: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    height, width, channels = found
    if (channels, height, width) != shape:
        raise DataError(f"{key} is {describe_shape((channels, height, width))}; it must be {describe_shape(shape)}")


def _decode_jpeg(data: Buffer, key: str, out: np.ndarray | None) -> np.ndarray:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("Gray", "YCbCr", "RGB"):
        raise DataError(f"{key} has {colours} colours; convert it to RGB or grey")
    _refuse_bomb(key, height=height, width=width)
    kind = "GRAY" if colours == "Gray" else "RGB"
    if out is None:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, kind, fastdct=False, fastupsample=False)
        return pixels
    rows, columns, channels = out.shape
    _check_shape(key, (height, width, 1 if kind == "GRAY" else 3), (channels, rows, columns))
    simplejpeg.decode_jpeg(data, kind, fastdct=False, fastupsample=False, buffer=out)
    return out


def _plain_png(data: bytes) -> tuple[int, int, str] | None:
    """(height, width, L or RGB) of a PNG of 8-bit grey or RGB; None for any other, which Pillow is to look at."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    if bits != 8 or colours not in _PNG_COLOURS:
        return None
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IDAT":
            return height, width, _PNG_COLOURS[colours]
        if name in (b"tRNS", b"acTL"):  # transparent, or animated
            return None
        place += length + 12
    return None


def _decode_png(data: bytes, key: str, kind: tuple[int, int, str]) -> np.ndarray:
    height, width, colours = kind
    _refuse_bomb(key, height=height, width=width)
    pixels: np.ndarray = pyspng.load(data, format=colours)
    return pixels.reshape(height, width, len(colours))


def _decode_by_pillow(data: Buffer, key: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _refuse_bomb(key, height=image.height, width=image.width)
        if image.has_transparency_data:
            raise DataError(f"{key} has an alpha channel; remove it, since a likelihood has no place for transparency")
        # Pillow turns 16-bit RGB into 8 bits without a word; the raw mode of the file still tells.
        if image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ())):
            raise DataError(f"{key} has 16 bits per channel; convert it to 8 bits")
        if image.mode not in _TO_MODE:
            raise DataError(f"{key} has {image.mode} colours; convert it to RGB or grey")
        if (frames := getattr(image, "n_frames", 1)) != 1:
            raise DataError(f"{key} holds {frames} frames; it must hold one image")
        pixels = np.asarray(image.convert(_TO_MODE[image.mode]))
        return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _refuse_bomb(key: str, *, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"{key} has {height} x {width} pixels; at most {MAX_PIXELS:,} are decoded: resize it first")


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
