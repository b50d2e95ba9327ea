"""Grey levels: what every observation model of grey values does alike.

Shapes: B images, C channels, H W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.model.noise import Noise

# Narrower distributions tell one grey level from the next no better; wider ones underflow float32.
MIN_LOG_SCALE, MAX_LOG_SCALE = -7.0, 30.0


@dataclass(frozen=True, kw_only=True)
class GreyLevels:
    """2^bits levels: the highest digits of 8-bit values."""

    bits: int = 8

    @property
    def is_density(self) -> bool:
        return False

    @property
    def density_bits_correction(self) -> float:
        """Bits per dimension; log2 of a density's bins over [0, 1], where it is one."""
        return math.log2(self.levels - 1) if self.is_density else 0.0

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def to_levels(self, images: UInt8[Tensor, "B C H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        return images >> (8 - self.bits)

    def to_inputs(self, levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (2 * levels.float() - (self.levels - 1)) / (self.levels - 1)

    def parameters_with_mean(
        self,
        mean_levels: Float[Tensor, "C H W"],
        parameters: Callable[[Tensor], Tensor],
        mean: Callable[[Tensor], Tensor],
        *,
        within: float = 8.0,
    ) -> Float[Tensor, "P H W"]:
        """Parameters, of a centre in [-within, within], whose mean is mean_levels, but a hundredth off black and white.

        There the centre would be infinite. mean grows with the centre: halving the interval finds it to 2^-32 of its length.
        """
        wanted = (mean_levels.float() / (self.levels - 1)).clamp(0.01, 0.99).unsqueeze(0)
        low, high = torch.full_like(wanted, -within), torch.full_like(wanted, within)
        for _ in range(32):
            centre = (low + high) / 2
            under = mean(parameters(centre)) < wanted
            low, high = torch.where(under, centre, low), torch.where(under, high, centre)
        return parameters((low + high) / 2).squeeze(0)

    def to_uint8(self, pixels: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        return to_grey(pixels, levels=self.levels)


def to_grey(pixels: Tensor, *, levels: int) -> UInt8[Tensor, "B C H W"]:
    unit = pixels if pixels.is_floating_point() else pixels.float() / (levels - 1)
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def nearest_level(x: Float[Tensor, "*shape"], *, levels: int) -> UInt8[Tensor, "*shape"]:
    """Of values in [-1, 1], or beyond."""
    return ((x + 1) / 2 * (levels - 1)).round().clamp(0, levels - 1).to(torch.uint8)


def log_one_minus_exp(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - e^-d) for d > 0 without cancellation at either end; both branches stay finite, so gradients do."""
    near = -torch.expm1(-d.clamp(max=math.log(2)))
    far = -(-d.clamp(min=math.log(2))).exp()
    return torch.where(d < math.log(2), near.log(), far.log1p())
