"""Grids have the geometry they should and lose no pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vaejob.pictures.grid import (
    BACKGROUND,
    BETWEEN_PAIRS,
    MAX_WIDTH,
    PLEASANT_WIDTH,
    SEPARATOR,
    WITHIN_PAIR,
    above,
    beside,
    grid,
    png_bytes,
)


def noise(count: int, channels: int = 1, height: int = 4, width: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    """[C, H, W]."""
    array = np.asarray(image)
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


def tile(array: np.ndarray, *, left: int, top: int, height: int = 4, width: int = 3) -> np.ndarray:
    return array[:, top : top + height, left : left + width]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_in_its_place_at_scale_one(channels: int) -> None:
    images = noise(7, channels)
    picture = pixels(grid(images, columns=3, scale=1))
    assert picture.shape == (channels, 3 * 4 + 2 * SEPARATOR, 3 * 3 + 2 * SEPARATOR)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        assert np.array_equal(tile(picture, left=column * (3 + SEPARATOR), top=row * (4 + SEPARATOR)), image)


def test_all_else_is_background() -> None:
    """Separators, and the places that the last row does not fill."""
    picture = pixels(grid(np.zeros((5, 1, 4, 3), dtype=np.uint8), columns=3, scale=1))
    assert (picture == 0).sum() == 5 * 4 * 3
    assert (picture == BACKGROUND).sum() == picture.size - 5 * 4 * 3


def test_a_scale_repeats_pixels() -> None:
    images = noise(1)
    assert np.array_equal(pixels(grid(images, columns=8, scale=5)), images[0].repeat(5, axis=1).repeat(5, axis=2))


def test_tensors_and_arrays_give_the_same_picture() -> None:
    images = noise(6, 3)
    assert grid(torch.from_numpy(images), columns=2) == grid(images, columns=2)


@pytest.mark.parametrize("size", [1, 8, 28, 32, 64, 96, 128, 256])
def test_pictures_have_a_pleasant_width(size: int) -> None:
    picture = grid(noise(16, 3, size, size), columns=8)
    assert PLEASANT_WIDTH * 2 / 3 <= picture.width <= MAX_WIDTH + 7 * SEPARATOR
    assert picture.height <= picture.width


def test_large_images_are_reduced_by_averages() -> None:
    images = np.full((2, 1, 1000, 1000), 10, dtype=np.uint8)
    images[:, :, ::2] = 30
    picture = pixels(grid(images, columns=2))
    assert picture.shape == (1, 500, 1000 + SEPARATOR)
    assert set(np.unique(picture)) == {20, BACKGROUND}


@pytest.mark.parametrize("count", [1, 3, 6])
def test_reconstructions_stand_at_the_right_of_their_originals(count: int) -> None:
    originals, reconstructions = noise(count, 3, 300, 200), noise(count, 3, 300, 200, seed=1)
    picture = pixels(beside(originals, reconstructions, pairs_per_row=2))
    for i in range(count):
        row, column = divmod(i, 2)
        left, top = column * (2 * 200 + WITHIN_PAIR + BETWEEN_PAIRS), row * (300 + SEPARATOR)
        place = {"top": top, "height": 300, "width": 200}
        assert np.array_equal(tile(picture, left=left, **place), originals[i])
        assert np.array_equal(tile(picture, left=left + 200 + WITHIN_PAIR, **place), reconstructions[i])


def test_reconstructions_stand_below_their_originals() -> None:
    originals, reconstructions = noise(5, 1, 200, 300), noise(5, 1, 200, 300, seed=1)
    picture = pixels(above(originals, reconstructions, columns=3))
    for i in range(5):
        row, column = divmod(i, 3)
        left, top = column * (300 + SEPARATOR), row * (2 * 200 + WITHIN_PAIR + BETWEEN_PAIRS)
        place = {"left": left, "height": 200, "width": 300}
        assert np.array_equal(tile(picture, top=top, **place), originals[i])
        assert np.array_equal(tile(picture, top=top + 200 + WITHIN_PAIR, **place), reconstructions[i])


def test_four_rows_of_pairs_are_as_large_as_eight_rows_of_a_grid() -> None:
    assert above(noise(32), noise(32), columns=8).size == grid(noise(64), columns=8).size


def test_a_png_file_holds_the_picture() -> None:
    picture = grid(noise(4, 3), columns=2)
    with Image.open(io.BytesIO(png_bytes(picture))) as read:
        assert read.format == "PNG"
        assert np.array_equal(pixels(read), pixels(picture))
