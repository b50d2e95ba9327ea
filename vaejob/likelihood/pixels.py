"""Observation models: what a pixel is, and how probable the decoder's parameters make it.

Shapes: B images, C channels, H W pixels, P = parameters_per_channel * C, laid out parameter by parameter.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.config import LikelihoodConfig
from vaejob.errors import ConfigError
from vaejob.model.noise import BINARIZE, PIXELS, Noise

# Narrower logistics tell one grey level from the next no better; wider ones underflow float32.
MIN_LOG_SCALE, MAX_LOG_SCALE = -7.0, 30.0


@runtime_checkable
class ObservationModel(Protocol):
    """p(x | z) over pixels that each take one of a few integer levels."""

    @property
    def levels(self) -> int: ...

    @property
    def parameters_per_channel(self) -> int: ...

    def to_levels(self, images: UInt8[Tensor, "B C H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        """What is modelled: 8-bit values with their lowest digits dropped, or binarised."""
        ...

    def to_inputs(self, levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """What the encoder sees."""
        ...

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        """Nats per image, computed in float32 whatever the decoder computes in."""
        ...

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]: ...

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        """The expected pixel, between 0 for the lowest level and 1 for the highest."""
        ...

    def to_uint8(self, pixels: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        """Levels, or means in [0, 1], as 8-bit grey for a picture."""
        ...

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        """Parameters that every image shares before anything is learnt."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Binary pixels; the parameter is the logit of one."""

    binarize: Literal["threshold", "static", "dynamic"] = "threshold"
    """static and dynamic differ only in the noise that the caller passes: one per image, or one per use."""
    levels = 2
    parameters_per_channel = 1

    def to_levels(self, images: UInt8[Tensor, "B C H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        if self.binarize == "threshold":
            return (images >= 128).to(torch.uint8)
        return (noise.uniform(BINARIZE, tuple(images.shape[1:])) < images / 255).to(torch.uint8)

    def to_inputs(self, levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return levels.float()

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        # log sigma(l) for a one, log sigma(-l) for a zero; log sigma(l) = -softplus(-l)
        sign = 1 - 2 * levels.float()
        return -F.softplus(sign * parameters.float()).flatten(1).sum(1)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        return (noise.uniform(PIXELS, tuple(parameters.shape[1:])) < self.mean(parameters)).to(torch.uint8)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        return parameters.float().sigmoid()

    def to_uint8(self, pixels: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        return _to_grey(pixels, levels=self.levels)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        return mean_levels.float().clamp(0.001, 0.999).logit()


@dataclass(frozen=True, kw_only=True)
class DiscretizedLogistic:
    """Grey levels, each with the mass of a logistic over its bin of [-1, 1]; the end bins are open."""

    bits: int = 8
    parameters_per_channel = 2

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def to_levels(self, images: UInt8[Tensor, "B C H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        return images >> (8 - self.bits)

    def to_inputs(self, levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (2 * levels.float() - (self.levels - 1)) / (self.levels - 1)

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        mean, log_scale = self._split(parameters)
        inverse_scale, top = (-log_scale).exp(), self.levels - 1
        # The bin of level j is [2j - n, 2j - n + 2] / (n - 1). Neighbours round their common edge alike, so that
        # what one gains by rounding the other loses.
        edge = 2 * levels.float() - self.levels
        # log(sigma(b) - sigma(a)) = log sigma(b) + log sigma(-a) + log(1 - e^-width), width = b - a
        below = F.logsigmoid(((edge + 2) / top - mean) * inverse_scale)
        above = F.logsigmoid((mean - edge / top) * inverse_scale)
        inside = below + above + _log_one_minus_exp(2 / top * inverse_scale)
        mass = torch.where(levels == 0, below, torch.where(levels == top, above, inside))
        return mass.flatten(1).sum(1)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        mean, log_scale = self._split(parameters)
        # Half a step keeps the uniform off 0, where the logit is infinite.
        uniform = noise.uniform(PIXELS, tuple(mean.shape[1:])) + 2.0**-25
        x = mean + log_scale.exp() * uniform.logit()
        return ((x + 1) / 2 * (self.levels - 1)).round().clamp(0, self.levels - 1).to(torch.uint8)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        # E[j] = sum over j >= 1 of P(level >= j); one bin's edge at a time keeps memory to a picture's
        mean, log_scale = self._split(parameters)
        total, top = torch.zeros_like(mean), self.levels - 1
        for level in range(1, self.levels):
            total += ((mean - (2 * level - 1 - top) / top) * (-log_scale).exp()).sigmoid()
        return total / top

    def to_uint8(self, pixels: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        return _to_grey(pixels, levels=self.levels)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        mean = 2 * mean_levels.float() / (self.levels - 1) - 1
        return torch.cat((mean, torch.full_like(mean, -2.0)))

    def _split(self, parameters: Float[Tensor, "B P H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        mean, log_scale = parameters.float().chunk(2, dim=1)
        return mean, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


def make_pixels(config: LikelihoodConfig) -> ObservationModel:
    if config.pixels == "discretized-logistic":
        return DiscretizedLogistic(bits=config.bits)
    # One bit without a rule is the highest of the eight: the same as a threshold at 128.
    return Bernoulli(binarize="threshold" if config.binarize == "none" else config.binarize)


def total_mass(pixels: ObservationModel, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, " N"]:
    """The probabilities of all levels, summed, for each channel of each pixel: 1 if this is a likelihood."""
    count = pixels.parameters_per_channel
    single = parameters.reshape(len(parameters), count, -1).movedim(1, 2).reshape(-1, count, 1, 1)
    mass = torch.zeros(len(single), dtype=torch.float64, device=single.device)
    for level in range(pixels.levels):
        everywhere = torch.full((len(single), 1, 1, 1), level, dtype=torch.uint8, device=single.device)
        mass += pixels.log_prob(single, everywhere).double().exp()
    return mass


def check_total_mass(pixels: ObservationModel, *, device: torch.device | str = "cpu") -> None:
    """Refuses to start a job whose likelihood is not one, over means past both ends and scales from spikes to flat."""
    edges = torch.linspace(-3, 3, 61, device=device)
    grid = torch.cartesian_prod(*[edges * (3.0 if i else 1.0) for i in range(pixels.parameters_per_channel)])
    wrong = (total_mass(pixels, grid.reshape(-1, pixels.parameters_per_channel, 1, 1)) - 1).abs().max().item()
    if not wrong <= 1e-5:
        raise ConfigError(
            f"likelihood.pixels has probabilities that sum to 1 +- {wrong:.1e} on {device}; they must within 1e-5"
        )


def _to_grey(pixels: Tensor, *, levels: int) -> UInt8[Tensor, "B C H W"]:
    unit = pixels if pixels.is_floating_point() else pixels.float() / (levels - 1)
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def _log_one_minus_exp(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - e^-d) for d > 0 without cancellation at either end; both branches stay finite, so gradients do."""
    near = -torch.expm1(-d.clamp(max=math.log(2)))
    far = -(-d.clamp(min=math.log(2))).exp()
    return torch.where(d < math.log(2), near.log(), far.log1p())
