"""Randomness that belongs to images: the same numbers in any batch, in any order, on any rank, after any restart.

An image's key is a hash of (seed, purpose, epoch, id). A key and a stream seed one splitmix64 sequence; its e-th hash
gives elements 2e and 2e + 1. Nothing is stored and nothing advances.

torch.compile must not look into the draws: inductor (torch 2.13, CPU) shifts int64 wrongly in the last, partly filled
vector of a row, and corrupts memory where int64 is viewed as int32. So a compiled graph is given them, drawn beforehand.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.compiler import is_compiling

# Streams of one image's noise; numbers that serve different ends never share one.
BINARIZE = 0  # the threshold of each pixel
PIXELS = 1  # a pixel drawn from the decoder
COMPONENT = 2  # which part of a mixture a pixel is drawn from
LATENT = 16  # the code of stochastic layer l is drawn from LATENT + l


class Noise(NamedTuple):
    """One key per image, on the device where the numbers are wanted."""

    keys: Int64[Tensor, " B"]
    drawn: Mapping[int, Float[Tensor, "B ..."]] | None = None
    """Normal numbers by their stream, which were drawn beforehand."""

    def normal(self, stream: int, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """N(0, 1) by Box and Muller, in float64 until the last rounding, which hides how devices differ in a logarithm."""
        if self.drawn is not None and stream in self.drawn:
            return self.drawn[stream]
        size = math.prod(shape)
        hashes = _hashes(self.keys, stream=stream, count=(size + 1) // 2)
        low, high = (hashes & 0xFFFFFFFF).double(), _shift(hashes, 32).double()
        radius = low.add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = high.mul_(2 * math.pi * 2.0**-32)
        pairs = torch.empty(*hashes.shape, 2, device=hashes.device)
        torch.mul(radius, angle.cos(), out=pairs[..., 0])
        torch.mul(radius, angle.sin_(), out=pairs[..., 1])
        return _cut(pairs, len(self.keys), size, shape)

    def uniform(self, stream: int, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """[0, 1) in multiples of 2^-24, all of which float32 holds exactly."""
        size = math.prod(shape)
        hashes = _hashes(self.keys, stream=stream, count=(size + 1) // 2)
        # The low half first: every device we meet is little-endian.
        halves = hashes.flatten().view(torch.int32)
        return _cut((halves & 0xFFFFFF).float().mul_(2.0**-24), len(self.keys), size, shape)

    def draw(self, streams: Iterable[tuple[int, tuple[int, ...]]]) -> "Noise":
        """With the normal numbers of these streams and shapes already drawn."""
        return self._replace(drawn={stream: self.normal(stream, shape) for stream, shape in streams})

    def fold(self, value: int) -> "Noise":
        """Independent noise for the same images, such as that of the value-th importance sample."""
        return self.folds(range(value, value + 1))

    def folds(self, values: range) -> "Noise":
        """The folds of several values, laid end to end: all images of the first, then all of the second."""
        steps = torch.arange(values.start, values.stop, values.step, device=self.keys.device) * _GAMMA
        return Noise(_mix_((self.keys ^ _FOLD) + steps[:, None]).flatten())


def image_noise(
    ids: NDArray[np.int64] | Int64[Tensor, " B"],
    *,
    seed: int,
    purpose: str,
    epoch: int = 0,
    device: torch.device | str,
) -> Noise:
    """What purpose draws for these images: train (anew each epoch), evaluate, static (binarisation), sample."""
    # Arrays from Arrow are read-only, which torch warns of; a copy of B ids costs nothing.
    held = ids if isinstance(ids, Tensor) else torch.from_numpy(np.array(ids, dtype=np.int64))
    keys = held.to(device, non_blocking=True) * _GAMMA
    return Noise(_mix_(keys.add_(_root(seed, purpose, epoch))))


@lru_cache(maxsize=1024)
def _root(seed: int, purpose: str, epoch: int) -> int:
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FOLD = _signed(0xD1342543DE82EF95)


def _hashes(keys: Int64[Tensor, " B"], *, stream: int, count: int) -> Int64[Tensor, "B count"]:
    seeds = _mix_(keys + _signed((stream + 1) * _GAMMA))
    steps = torch.arange(1, count + 1, device=keys.device).mul_(_GAMMA)
    return _mix_(seeds[:, None] + steps)


def _mix_(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The finaliser of splitmix64, in place; int64 products wrap as unsigned ones do."""
    assert not is_compiling(), "a compiled graph is given its noise, drawn beforehand"
    if state.device.type == "cpu":
        # numpy knows a logical shift, and takes half of torch's time for many numbers, a quarter for few.
        words = state.numpy().view(np.uint64)
        words ^= words >> _WORDS[30]
        words *= _WORDS[0xBF58476D1CE4E5B9]
        words ^= words >> _WORDS[27]
        words *= _WORDS[0x94D049BB133111EB]
        words ^= words >> _WORDS[31]
        return state
    state.bitwise_xor_(_shift(state, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    state.bitwise_xor_(_shift(state, 27)).mul_(_signed(0x94D049BB133111EB))
    return state.bitwise_xor_(_shift(state, 31))


_WORDS = {value: np.uint64(value) for value in (27, 30, 31, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)}


def _shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """A logical shift to the right: torch's own copies the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _cut(numbers: Tensor, images: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """They were made in twos: without the last of an odd number."""
    return numbers.reshape(images, size + size % 2)[:, :size].reshape(images, *shape)
