"""Gaussians over grey values, as masses of bins and as a density.

Shapes: B images, C H W channels and pixels, P = 2 C: all means, then all log scales.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.likelihood.levels import MAX_LOG_SCALE, MIN_LOG_SCALE, GreyLevels, log_one_minus_exp, nearest_level
from vaejob.model.noise import PIXELS, Noise

_NODES, _WEIGHTS = (part.tolist() for part in np.polynomial.legendre.leggauss(6))


@dataclass(frozen=True, kw_only=True)
class DiscretizedGaussian(GreyLevels):
    """Grey levels, each with the mass of a Gaussian over its bin of [-1, 1]; the end bins are open.

    Nats are within 1e-5 relative and 1e-5 absolute, besides the rounding of the distance from the mean.
    """

    def parameters(self, channels: int) -> int:
        return 2 * channels

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        mean, log_scale = self._split(parameters)
        top = self.levels - 1
        # In half bins the edges are whole numbers, and neighbours round their common edge alike.
        shift, half, edge = mean * top, (-log_scale).exp() / top, 2 * levels.float() - self.levels
        low, high, away = (edge - shift) * half, (edge + 2 - shift) * half, edge + 1 - shift
        below, above = _log_ndtr(high), _log_ndtr(-low)
        near, far = torch.where(away >= 0, -low, high), torch.where(away >= 0, -high, low)
        inside = _log_between(away.abs() * half, half, -log_scale - math.log(top), near, far)
        mass = torch.where(levels == 0, below, torch.where(levels == top, above, inside))
        return mass.flatten(1).sum(1)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        mean, log_scale = self._split(parameters)
        x = mean + log_scale.exp() * noise.normal(PIXELS, tuple(mean.shape[1:]))
        return nearest_level(x, levels=self.levels)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        mean, log_scale = self._split(parameters)
        total, top = torch.zeros_like(mean), self.levels - 1
        for level in range(1, self.levels):
            total += torch.special.ndtr((mean - (2 * level - 1 - top) / top) * (-log_scale).exp())
        return total / top

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        def parameters(centre: Tensor) -> Tensor:
            return torch.cat((centre, torch.full_like(centre, -1.5)), dim=1)

        return self.parameters_with_mean(mean_levels, parameters, self.mean)

    def _split(self, parameters: Float[Tensor, "B P H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        mean, log_scale = parameters.float().chunk(2, dim=1)
        return mean, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


def _log_ndtr(z: Tensor) -> Tensor:
    """In float64: torch's own in float32 has a gradient that is wrong by 5 % at -1e3 and lost at -1e7."""
    return torch.special.log_ndtr(z.double()).float()  # type: ignore[no-any-return]


def _log_between(m: Tensor, h: Tensor, log_h: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """log of the normal mass of [m - h, m + h], m >= 0; near and far are -(m - h) and -(m + h)."""
    # phi(m) * integral of e^(-m t - t^2 / 2) over [-h, h]: terms of one sign, so nothing cancels. Six nodes are
    # good to 1e-8 where m h <= 2 and h <= 0.7.
    wide = (m * h > 2) | (h > 0.7)
    m_narrow, h_narrow = torch.where(wide, 0.0, m), torch.where(wide, 0.5, h)
    total = torch.zeros_like(m)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        t = node * h_narrow
        total = total + weight * (-m_narrow * t - t.square() / 2).exp()
    narrow = -m_narrow.square() / 2 - 0.5 * math.log(2 * math.pi) + log_h + total.log()
    # Otherwise the two tails differ by a factor of 3 or more, and their logarithms may be subtracted.
    log_near = _log_ndtr(torch.where(wide, near, 0.0))
    gap = log_near - _log_ndtr(torch.where(wide, far, -1.0))
    return torch.where(wide, log_near + log_one_minus_exp(gap), narrow)


@dataclass(frozen=True, kw_only=True)
class GaussianDensity(GreyLevels):
    """A density of x = level / (levels - 1), normalised over the real line; it may exceed 1."""

    @property
    def is_density(self) -> bool:
        return True

    def parameters(self, channels: int) -> int:
        return 2 * channels

    def log_density(self, parameters: Float[Tensor, "B P H W"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        mean, log_scale = self._split(parameters)
        z = (x - mean) * (-log_scale).exp()
        return -(0.5 * z.square() + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def support(
        self, parameters: Float[Tensor, "B P H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Outside of it lies less than 1e-8 of the mass."""
        mean, log_scale = self._split(parameters)
        return mean - 6 * log_scale.exp(), mean + 6 * log_scale.exp()

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        return self.log_density(parameters, levels.float() / (self.levels - 1))

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        mean, log_scale = self._split(parameters)
        x = mean + log_scale.exp() * noise.normal(PIXELS, tuple(mean.shape[1:]))
        return nearest_level(2 * x - 1, levels=self.levels)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        return self._split(parameters)[0].clamp(0, 1)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        mean = mean_levels.float() / (self.levels - 1)
        return torch.cat((mean, torch.full_like(mean, -1.5)))

    def _split(self, parameters: Float[Tensor, "B P H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        mean, log_scale = parameters.float().chunk(2, dim=1)
        # Half a grey level: the density of data on a grid has no upper bound as its scale goes to 0.
        return mean, log_scale.clamp(math.log(0.5 / (self.levels - 1)), MAX_LOG_SCALE)
