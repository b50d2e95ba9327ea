"""The images that every loader is given: made once, kept encoded on disk, and known again by a hash of their pixels.

Shapes: N images, b images of one batch, C channels, H W pixels; every image of a case has the same.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyspng
import scipy.fft
import simplejpeg
import torch
from PIL import Image

from vaejob.data.decode import decode_image
from vaejob.data.sources import open_source

Kind = Literal["raw", "png", "jpeg"]

JPEG_QUALITY = 90
BLOCK = 100
"""Images made together."""
# Natural images have amplitudes of about 1 / frequency; a little less detail gives the file sizes of CIFAR and ImageNet.
SPECTRUM = 1.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One data set to stream."""

    kind: Kind
    side: int
    """Pixels along either edge."""
    images: int
    shard_bytes: int = 64 << 20

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.side, self.side)


@dataclass(frozen=True)
class Pictures:
    """A case's images in one file, each as the bytes that a loader would store."""

    case: Case
    folder: Path

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._bodies[start : self._ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def hashes(self) -> np.ndarray:
        """pixel_hashes of every image, in order."""
        return np.load(self.folder / "hashes.npy")

    @cached_property
    def _bodies(self) -> np.ndarray:
        return np.memmap(self.folder / "bodies.bin", dtype=np.uint8, mode="r")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.load(self.folder / "ends.npy")


def make_pictures(case: Case, folder: Path, *, grown_from: str | None) -> None:
    """Writes a case's images: random fields, or a data set's images at the case's size with some texture added."""
    folder.mkdir(parents=True)
    sizes, hashes = [], []
    blocks = random_fields(case) if grown_from is None else grown_images(case, grown_from)
    with (folder / "bodies.bin").open("wb") as file:
        for block in blocks:
            encoded = [encode(case.kind, image) for image in block]
            file.writelines(encoded)
            sizes += map(len, encoded)
            hashes.append(pixel_hashes(to_batch(case, encoded)))
    np.save(folder / "ends.npy", np.cumsum(sizes))
    np.save(folder / "hashes.npy", np.concatenate(hashes))


def random_fields(case: Case) -> Iterator[np.ndarray]:
    """Blocks of images with the spectrum of photographs, uint8 [b, H, W, C]: mostly light and dark, some colour."""
    for first in range(0, case.images, BLOCK):
        rng = np.random.default_rng([case.side, first])
        block = min(BLOCK, case.images - first)
        light, red, blue = (field(rng, images=block, side=case.side) for _ in range(3))
        yield to_pixels(120 + 50 * np.stack([light + 0.3 * red, light, light + 0.3 * blue], axis=-1))


def grown_images(case: Case, address: str) -> Iterator[np.ndarray]:
    """Blocks of the source's images at the case's size, uint8 [b, H, W, C]; once they are used up, mirrored."""
    source = open_source(address)
    for first in range(0, case.images, BLOCK):
        rng = np.random.default_rng([case.side, first])
        grown = []
        for i in range(first, min(first + BLOCK, case.images)):
            turn, place = divmod(i, len(source.samples))
            data = source.read(place)
            image = decode_image(data, source.samples[place].key) if isinstance(data, bytes) else data
            resized = Image.fromarray(image.transpose(1, 2, 0)).resize((case.side, case.side), Image.Resampling.BICUBIC)
            grown.append(np.asarray(resized)[:, :: -1 if turn % 2 else 1])
        pixels = np.stack(grown)
        enlarged = pixels.shape[1] > image.shape[1]
        texture = 8 * field(rng, images=len(pixels), side=case.side)[..., None] if enlarged else 0
        yield to_pixels(pixels + texture)


def field(rng: np.random.Generator, *, images: int, side: int) -> np.ndarray:
    """Random fields of mean 0 and variance 1, float32 [images, side, side]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)) * side
    waves = rng.standard_normal((2, images, *frequency.shape), dtype=np.float32)
    amplitude = (1 / np.maximum(1, frequency) ** SPECTRUM).astype(np.float32)
    values = scipy.fft.irfft2((waves[0] + 1j * waves[1]) * amplitude, s=(side, side))
    return (values - values.mean(axis=(1, 2), keepdims=True)) / values.std(axis=(1, 2), keepdims=True)


def to_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def encode(kind: Kind, image: np.ndarray) -> bytes:
    """The stored bytes of an image uint8 [H, W, C]; raw is its pixels, planar."""
    match kind:
        case "raw":
            return image.transpose(2, 0, 1).tobytes()
        case "jpeg":
            return simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY)
        case "png":
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            return file.getvalue()


def to_batch(case: Case, stored: Sequence[bytes]) -> torch.Tensor:
    """The images of a batch, uint8 [b, C, H, W]; every peer decodes here, as fast as is exact.

    What is decoded stays in the decoder's order in memory, channels last: reordering is cheaper on the device.
    """
    if case.kind == "raw":
        # bytearray, since torch wants memory that may be written to
        return torch.frombuffer(bytearray().join(stored), dtype=torch.uint8).view(len(stored), *case.shape)
    images = np.empty((len(stored), case.side, case.side, 3), dtype=np.uint8)
    for image, data in zip(images, stored, strict=True):
        if case.kind == "jpeg":
            simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=image)
        else:
            image[...] = pyspng.load(bytes(data))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def pixel_hashes(images: torch.Tensor) -> np.ndarray:
    """A hash of every image's pixels, uint64 [b]."""
    words = images.contiguous().numpy().reshape(len(images), -1).view(np.uint64)
    odd = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    return words @ odd
