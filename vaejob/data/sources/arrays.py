"""Images that are arrays: in memory, MNIST's idx files, npz files, CIFAR's binary records."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from vaejob.data.sources.files import map_file
from vaejob.data.sources.source import Sample
from vaejob.errors import DataError


@dataclass(frozen=True)
class ArraySource:
    """Images that are already pixels."""

    description: str
    images: np.ndarray
    """uint8 [N, C, H, W]."""
    keys: Sequence[str] | None = None
    """One name each; without them, their numbers."""

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            found = f"{self.images.dtype} {list(self.images.shape)}"
            raise DataError(f"{self.description} is {found}; images must be uint8 [N, C, H, W]")
        if self.keys is not None and len(self.keys) != len(self.images):
            raise DataError(f"{self.description} has {len(self.keys)} keys for {len(self.images)} images")

    @cached_property
    def samples(self) -> list[Sample]:
        keys = self.keys or [f"{index:08d}" for index in range(len(self.images))]
        return [Sample(key, hashlib.sha256(self.read(index).data).hexdigest()[:16]) for index, key in enumerate(keys)]

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.images[index])


def open_idx(address: str) -> ArraySource:
    """MNIST's format: 0 0 type dimensions, the lengths as big-endian 32-bit numbers, then the pixels."""
    content = map_file(address)
    if content[:3] != b"\0\0\x08" or len(content) < 16:
        raise DataError(f"{address} is no idx file of 8-bit pixels")
    if content[3] != 3:
        raise DataError(f"{address} has {content[3]} dimensions; name the idx file of the images, which has 3")
    count, height, width = (int(length) for length in np.frombuffer(content, dtype=">u4", count=3, offset=4))
    if len(content) != 16 + count * height * width:
        raise DataError(
            f"{address} has {len(content)} bytes; {count} images of {height} x {width} need {16 + count * height * width}"
        )
    pixels = np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, 1, height, width)
    return ArraySource(f"idx {address}: {count} images", pixels)


def open_npz(address: str, *, column: str | None = None) -> ArraySource:
    """The array of uint8 images [N, H, W] or [N, H, W, C] in an npz file."""
    try:
        with np.load(pa.BufferReader(pa.py_buffer(map_file(address))), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if column in (None, name)}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
        raise DataError(f"{address} is no npz file of plain arrays: {error}") from error
    images = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)}
    if len(images) != 1:
        found = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()) or "none"
        raise DataError(
            f"{address} must hold one uint8 array [N, H, W] or [N, H, W, C]; found: {found}; name one with --column"
        )
    name, pixels = images.popitem()
    planar = pixels[:, np.newaxis] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return ArraySource(f"npz {address} ({name}): {len(planar)} images", planar)


def open_cifar(address: str) -> ArraySource:
    """CIFAR's binary records: one label byte (CIFAR-100: two), then 3 x 32 x 32 planar bytes."""
    content = map_file(address)
    for label_bytes in (1, 2):
        records, rest = divmod(len(content), label_bytes + 3072)
        if rest == 0:
            pixels = np.frombuffer(content, dtype=np.uint8).reshape(records, -1)[:, label_bytes:]
            return ArraySource(f"CIFAR {address}: {records} images", pixels.reshape(records, 3, 32, 32))
    raise DataError(f"{address} has {len(content)} bytes; CIFAR's records have 3073 or 3074 bytes each")
