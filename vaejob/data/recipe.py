"""What is done to one image on its way into a shard."""

from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from vaejob.data.ahead import map_ahead
from vaejob.data.decode import crop_and_resize, decode_image, describe_shape, encode_png, encoding_of
from vaejob.data.sources import ImageSource
from vaejob.errors import DataError

LARGEST_RAW = 3 * 64 * 64
"""Bytes of pixels up to which images are stored raw unless another encoding is asked for."""

_IMAGES_WEIGHED = 64

Encoding = Literal["auto", "raw", "keep"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The same for every image of a source."""

    shape: tuple[int, int, int]
    encoding: Literal["raw", "encoded"]
    size: int | None
    """Side of the square that each image is cropped and resized to."""
    first_key: str
    """The image that decided the shape."""

    @property
    def image_bytes(self) -> int | None:
        """Stored bytes of every image; None where they differ."""
        channels, height, width = self.shape
        return channels * height * width if self.encoding == "raw" else None

    def settings(self) -> tuple[object, ...]:
        return astuple(self)


def choose_recipe(source: ImageSource, *, size: int | None, encoding: Encoding) -> Recipe:
    """The recipe that the first image of a source and the caller's wishes amount to."""
    if encoding not in ("auto", "raw", "keep"):
        raise DataError(f"--encoding is {encoding}; it must be auto, raw or keep")
    key = source.samples[0].key
    image = _pixels(source.read(0), key, size=size)
    if image.shape[0] not in (1, 3):
        raise DataError(f"{key} has {image.shape[0]} channels; it must have 1 (grey) or 3 (RGB)")
    raw = encoding == "raw" or (encoding == "auto" and image.size <= LARGEST_RAW)
    channels, height, width = image.shape
    return Recipe(shape=(channels, height, width), encoding="raw" if raw else "encoded", size=size, first_key=key)


def stored_bytes(source: ImageSource, recipe: Recipe) -> float:
    """Bytes of a stored image: of every one if they are raw, else the mean of some from all over the source."""
    if recipe.image_bytes is not None:
        return recipe.image_bytes
    count = len(source.samples)
    some = sorted({index * count // _IMAGES_WEIGHED for index in range(_IMAGES_WEIGHED)})
    return sum(len(stored) for _, stored in map_ahead(lambda index: prepare(source, index, recipe), some)) / len(some)


def prepare(source: ImageSource, index: int, recipe: Recipe) -> tuple[np.ndarray, bytes]:
    """The pixels of one sample, uint8 [C, H, W], and the bytes that stand for them in a shard."""
    key, found = source.samples[index].key, source.read(index)
    image = _pixels(found, key, size=recipe.size)
    if image.shape != recipe.shape:
        raise DataError(_other_shape(key, image.shape, recipe))
    if recipe.encoding == "raw":
        return image, image.tobytes()
    if isinstance(found, bytes) and recipe.size is None and encoding_of(found) is not None:
        return image, found
    return image, encode_png(image)


def _pixels(found: bytes | np.ndarray, key: str, *, size: int | None) -> np.ndarray:
    image = decode_image(found, key) if isinstance(found, bytes) else found
    return image if size is None else crop_and_resize(image, size)


def _other_shape(key: str, shape: tuple[int, ...], recipe: Recipe) -> str:
    found, first = describe_shape(shape), f"{recipe.first_key} is {describe_shape(recipe.shape)}"
    if shape[0] != recipe.shape[0]:
        return f"{key} is {found}, {first}; convert them all to grey or all to RGB"
    return f"{key} is {found}, {first}; use --size N to crop and resize them all to N x N"
