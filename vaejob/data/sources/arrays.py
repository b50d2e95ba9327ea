"""Images that are arrays: in memory, MNIST's idx files, npz files, CIFAR's binary records."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from vaejob.data.sources.content import Content, ContentFile, open_content
from vaejob.data.sources.recent import Recent
from vaejob.data.sources.source import Reopened, Sample
from vaejob.data.sources.zips import ZIP_DAMAGE
from vaejob.errors import DataError

_MOST_BYTES = 8 << 30  # of an array in an npz file, however well it is compressed

# Those on either side of a border between two files, for two shards that are packed at once.
_arrays: Recent[tuple[str, str, str], np.ndarray] = Recent(most=4)


@dataclass(frozen=True)
class ArraySource(Reopened):
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


@dataclass(frozen=True)
class ArrayFileSource(Reopened):
    """A file of pixels, all of which are loaded by the first read."""

    content: Content
    load: Callable[[Content], np.ndarray]
    """To uint8 [N, C, H, W]; raises DataError."""
    count: int
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(f"{index:08d}", self.content.version) for index in range(self.count)]

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self._images[index])

    @property
    def _images(self) -> np.ndarray:
        key = self.content.address, self.content.version, self.description
        return _arrays.get(key, lambda: self.load(self.content))


def open_idx(address: str, *, version: str | None = None) -> ArrayFileSource:
    return _opened(f"idx {address}", open_content(address, version), _load_idx)


def open_npz(address: str, *, column: str | None = None, version: str | None = None) -> ArrayFileSource:
    """The array of uint8 images [N, H, W] or [N, H, W, C] in an npz file."""
    content = open_content(address, version)
    arrays = _npz_arrays(content, column)
    found = [name for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)]
    if len(found) != 1:
        known = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()) or "none"
        raise DataError(
            f"{address} must hold one uint8 array [N, H, W] or [N, H, W, C]; found: {known}; name one with --column"
        )
    return _opened(f"npz {address} ({found[0]})", content, partial(_load_npz, name=found[0]))


def open_cifar(address: str, *, version: str | None = None) -> ArrayFileSource:
    return _opened(f"CIFAR {address}", open_content(address, version), _load_cifar)


def _opened(what: str, content: Content, load: Callable[[Content], np.ndarray]) -> ArrayFileSource:
    count = len(load(content))
    return ArrayFileSource(content, load, count, f"{what}: {count} images")


def _load_idx(content: Content) -> np.ndarray:
    """MNIST's format: 0 0 type dimensions, the lengths as big-endian 32-bit numbers, then the pixels."""
    address, data = content.address, content.read(0, content.size)
    if data[:3] != b"\0\0\x08" or len(data) < 16:
        raise DataError(f"{address} is no idx file of 8-bit pixels")
    if data[3] != 3:
        raise DataError(f"{address} has {data[3]} dimensions; name the idx file of the images, which has 3")
    count, height, width = (int(length) for length in np.frombuffer(data, dtype=">u4", count=3, offset=4))
    if len(data) != 16 + count * height * width:
        raise DataError(
            f"{address} has {len(data)} bytes; {count} images of {height} x {width} need {16 + count * height * width}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=16).reshape(count, 1, height, width)


def _load_npz(content: Content, *, name: str) -> np.ndarray:
    pixels = _npz_arrays(content, name)[name]
    return pixels[:, np.newaxis] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def _npz_arrays(content: Content, column: str | None) -> dict[str, np.ndarray]:
    """The arrays of an npz file, or the one of that name."""
    try:
        with np.load(ContentFile(content), allow_pickle=False) as file:
            if (most := max((member.file_size for member in file.zip.infolist()), default=0)) > _MOST_BYTES:
                raise DataError(f"{content.address} holds an array of {most} bytes; at most {_MOST_BYTES} are loaded")
            return {name: file[name] for name in file.files if column in (None, name)}
    except (*ZIP_DAMAGE, OSError, MemoryError) as error:
        raise DataError(f"{content.address} is no npz file of plain arrays: {error}") from error


def _load_cifar(content: Content) -> np.ndarray:
    """CIFAR's binary records: one label byte (CIFAR-100: two), then 3 x 32 x 32 planar bytes."""
    for label_bytes in (1, 2):
        records, rest = divmod(content.size, label_bytes + 3072)
        if rest == 0:
            data = np.frombuffer(content.read(0, content.size), dtype=np.uint8)
            return data.reshape(records, -1)[:, label_bytes:].reshape(records, 3, 32, 32)
    raise DataError(f"{content.address} has {content.size} bytes; CIFAR's records have 3073 or 3074 bytes each")
