"""Many small images as one picture. Shapes: B images, C channels (grey or RGB), H W pixels."""

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

PLEASANT_WIDTH = 520
"""Small images are enlarged until their grid has about this many pixels."""
MAX_WIDTH = 1200
"""Large images are reduced until it has less than about this many."""
BACKGROUND = 255
# Four rows of pairs are as high as eight rows of a grid: 4 x 2 + 3 x 9 = 7 x 5.
SEPARATOR, WITHIN_PAIR, BETWEEN_PAIRS = 5, 2, 9

Images = UInt8[Tensor, "B C H W"] | UInt8[np.ndarray, "B C H W"]


def grid(images: Images, *, columns: int, scale: int | None = None, max_width: int = MAX_WIDTH) -> Image.Image:
    """The images row by row, each enlarged scale times; without a scale, to a pleasant size."""
    columns = min(columns, len(images))
    if scale is None:
        scale = _fitting_scale(columns * images.shape[3], max_width=max_width)
    return _laid_out(_tiles(images, scale), columns=columns)


def beside(originals: Images, reconstructions: Images, *, pairs_per_row: int = 4) -> Image.Image:
    """Each original with its reconstruction at its right."""
    columns = min(pairs_per_row, len(originals))
    scale = _fitting_scale(2 * columns * originals.shape[3], max_width=MAX_WIDTH)
    return _laid_out(_pairs(originals, reconstructions, scale, axis=2), columns=columns, across=BETWEEN_PAIRS)


def above(originals: Images, reconstructions: Images, *, columns: int, max_width: int = MAX_WIDTH) -> Image.Image:
    """Each original above its reconstruction, as wide as a grid of as many columns."""
    columns = min(columns, len(originals))
    scale = _fitting_scale(columns * originals.shape[3], max_width=max_width)
    return _laid_out(_pairs(originals, reconstructions, scale, axis=1), columns=columns, down=BETWEEN_PAIRS)


def png_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _fitting_scale(width: int, *, max_width: int) -> int:
    """How often to repeat each pixel of tiles that are this wide together; -n makes one of n x n pixels."""
    return -math.ceil(width / max_width) if width > max_width else max(1, round(PLEASANT_WIDTH / width))


def _tiles(images: Images, scale: int) -> list[np.ndarray]:
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    assert array.dtype == np.uint8, array.dtype
    if scale > 0:
        return list(array.repeat(scale, axis=2).repeat(scale, axis=3))
    return [_from_pillow(_to_pillow(image).reduce(-scale)) for image in array]


def _pairs(originals: Images, reconstructions: Images, scale: int, *, axis: int) -> list[np.ndarray]:
    both = zip(_tiles(originals, scale), _tiles(reconstructions, scale), strict=True)
    return [_joined(pair, axis=axis, separator=WITHIN_PAIR) for pair in both]


def _laid_out(tiles: list[np.ndarray], *, columns: int, across: int = SEPARATOR, down: int = SEPARATOR) -> Image.Image:
    empty = [np.full_like(tiles[0], BACKGROUND)] * (-len(tiles) % columns)
    rows = [(tiles + empty)[start : start + columns] for start in range(0, len(tiles), columns)]
    return _to_pillow(_joined([_joined(row, axis=2, separator=across) for row in rows], axis=1, separator=down))


def _joined(parts: Sequence[np.ndarray], *, axis: int, separator: int) -> np.ndarray:
    """Equal parts [C, H, W] in a column (axis 1) or a row (axis 2)."""
    gap_shape = list(parts[0].shape)
    gap_shape[axis] = separator
    gap = np.full(gap_shape, BACKGROUND, dtype=np.uint8)
    between = [piece for part in parts for piece in (gap, part)]
    return np.concatenate(between[1:], axis=axis)


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
