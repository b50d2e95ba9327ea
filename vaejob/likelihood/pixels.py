"""Observation models: what a pixel is, and how probable the decoder's parameters make it.

Shapes: B images, C channels, H W pixels, P planes of parameters over all channels, laid out parameter by parameter.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.config import LikelihoodConfig
from vaejob.errors import ConfigError
from vaejob.likelihood.bernoulli import Bernoulli, ContinuousBernoulli
from vaejob.likelihood.categorical import Categorical
from vaejob.likelihood.gaussian_pixels import DiscretizedGaussian, GaussianDensity
from vaejob.likelihood.logistic import DiscretizedLogistic, DiscretizedLogisticMixture
from vaejob.model.noise import Noise

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "GaussianDensity",
    "ObservationModel",
    "check_total_mass",
    "make_pixels",
    "total_mass",
]


@runtime_checkable
class ObservationModel(Protocol):
    """p(x | z) over pixels that each take one of a few integer levels."""

    @property
    def levels(self) -> int: ...

    @property
    def is_density(self) -> bool:
        """Whether log_prob is of a density of x = level / (levels - 1), which may exceed 1, rather than of a mass."""
        ...

    @property
    def density_bits_correction(self) -> float:
        """Added to a density's bits per dimension; it takes density times bin width for the bin's mass; 0 for masses."""
        ...

    def parameters(self, channels: int) -> int:
        """Planes that the decoder puts out, over all channels."""
        ...

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


@runtime_checkable
class Density(Protocol):
    """What can be integrated besides."""

    def log_density(self, parameters: Float[Tensor, "B P H W"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]: ...

    def support(
        self, parameters: Float[Tensor, "B P H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]: ...


def make_pixels(config: LikelihoodConfig) -> ObservationModel:
    match config.pixels:
        case "bernoulli":
            # One bit without a rule is the highest of the eight: the same as a threshold at 128.
            return Bernoulli(binarize="threshold" if config.binarize == "none" else config.binarize)
        case "continuous-bernoulli":
            return ContinuousBernoulli(bits=config.bits)
        case "categorical":
            return Categorical(bits=config.bits)
        case "discretized-logistic":
            return DiscretizedLogistic(bits=config.bits)
        case "discretized-logistic-mixture":
            return DiscretizedLogisticMixture(bits=config.bits, components=config.components)
        case "discretized-gaussian":
            return DiscretizedGaussian(bits=config.bits)
        case "gaussian":
            return GaussianDensity(bits=config.bits)


def total_mass(pixels: ObservationModel, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, " N"]:
    """The mass of each channel of each pixel, summed over levels or integrated: 1 if this is a likelihood.

    A mixture's channels are not independent; it is taken with the parameters of a single one.
    """
    count = pixels.parameters(1)
    single = parameters.reshape(len(parameters), count, -1).movedim(1, 2).reshape(-1, count, 1, 1)
    mass = torch.zeros(len(single), dtype=torch.float64, device=single.device)
    if isinstance(pixels, Density):
        low, high = pixels.support(single)
        for node, weight in zip(*np.polynomial.legendre.leggauss(96), strict=True):
            x = low + (high - low) * (float(node) + 1) / 2
            mass += float(weight) / 2 * pixels.log_density(single, x).double().exp()
        return mass * (high - low).double().flatten()
    for level in range(pixels.levels):
        everywhere = torch.full((len(single), 1, 1, 1), level, dtype=torch.uint8, device=single.device)
        mass += pixels.log_prob(single, everywhere).double().exp()
    return mass


def check_total_mass(pixels: ObservationModel, *, device: torch.device | str = "cpu") -> None:
    """Refuses to start a job whose likelihood is not one, over means past both ends and scales from spikes to flat."""
    count = pixels.parameters(1)
    edges = torch.linspace(-3, 3, 61, device=device)
    if count <= 2:
        grid = torch.cartesian_prod(*[edges * (3.0 if i else 1.0) for i in range(count)])
    else:
        rows = torch.randn(64, count, generator=torch.Generator().manual_seed(0))
        grid = torch.cat((rows, 5 * rows)).to(device)
    wrong = (total_mass(pixels, grid.reshape(-1, count, 1, 1)) - 1).abs().max().item()
    allowed = 1e-4 if pixels.is_density else 1e-5
    if not wrong <= allowed:
        raise ConfigError(
            f"likelihood.pixels has probabilities that sum to 1 +- {wrong:.1e} on {device}; "
            f"they must within {allowed:.0e}"
        )
