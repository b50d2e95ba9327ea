"""Discretised logistics, alone and mixed. Shapes: B images, C H W channels and pixels, M components, P parameters."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.likelihood.levels import MAX_LOG_SCALE, MIN_LOG_SCALE, GreyLevels, nearest_level
from vaejob.likelihood.logistic_mass import Bins, logistic_mass, mixture, single, summed
from vaejob.model.noise import COMPONENT, PIXELS, Noise


def log_mass(mean: Tensor, log_scale: Tensor, levels: Tensor, *, count: int) -> Tensor:
    """Nats of each of `count` levels under a logistic over [-1, 1]; arguments broadcast, the end bins are open."""
    return logistic_mass(mean, log_scale, Bins.of(levels, count=count, dtype=mean.dtype), slopes=False).nats


def expected_level(mean: Tensor, log_scale: Tensor, *, count: int) -> Tensor:
    """Between 0 and 1. E[j] = sum over j >= 1 of P(level >= j); one edge at a time keeps memory to a picture's."""
    total, top, inverse_scale = torch.zeros_like(mean), count - 1, (-log_scale).exp()
    for level in range(1, count):
        total += ((mean - (2 * level - 1 - top) / top) * inverse_scale).sigmoid()
    return total / top


@dataclass(frozen=True, kw_only=True)
class DiscretizedLogistic(GreyLevels):
    """Grey levels, each with the mass of a logistic over its bin of [-1, 1]; the end bins are open."""

    def parameters(self, channels: int) -> int:
        return 2 * channels

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        return summed(parameters, levels, single, count=self.levels)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        mean, log_scale = self._split(parameters)
        # Half a step keeps the uniform off 0, where the logit is infinite.
        uniform = noise.uniform(PIXELS, tuple(mean.shape[1:])) + 2.0**-25
        return nearest_level(mean + log_scale.exp() * uniform.logit(), levels=self.levels)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        return expected_level(*self._split(parameters), count=self.levels)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        def parameters(centre: Tensor) -> Tensor:
            return torch.cat((centre, torch.full_like(centre, -2.0)), dim=1)

        return self.parameters_with_mean(mean_levels, parameters, self.mean)

    def _split(self, parameters: Float[Tensor, "B P H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        mean, log_scale = parameters.float().chunk(2, dim=1)
        return mean, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


class Mixture(NamedTuple):
    """The planes of a mixture, told apart."""

    log_weights: Float[Tensor, "B M H W"]
    mean: Float[Tensor, "B M C H W"]
    log_scale: Float[Tensor, "B M C H W"]
    coupling: Float[Tensor, "B M 3 H W"] | None  # green on red, blue on red, blue on green; RGB only


@dataclass(frozen=True, kw_only=True)
class DiscretizedLogisticMixture(GreyLevels):
    """log sum_m pi_m prod_c P(x_c | mu_mc(x_<c), s_mc): the channels of a pixel share its component (PixelCNN++).

    In [-1, 1], mu_G += a x_R and mu_B += b x_R + c x_G, with the levels themselves and a, b, c = tanh of parameters.
    """

    components: int = 10

    def parameters(self, channels: int) -> int:
        return self.components * (1 + 2 * channels + (3 if channels == 3 else 0))

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        return summed(parameters, levels, partial(mixture, components=self.components), count=self.levels)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        mixture = self._split(parameters)
        below = mixture.log_weights.exp().cumsum(1)[:, :-1]
        chosen = (noise.uniform(COMPONENT, tuple(below.shape[2:])).unsqueeze(1) >= below).sum(1, keepdim=True)
        at = chosen.unsqueeze(2)
        mean, log_scale = (
            planes.gather(1, at.expand(-1, -1, planes.shape[2], -1, -1)) for planes in (mixture.mean, mixture.log_scale)
        )
        coupling = None if mixture.coupling is None else mixture.coupling.gather(1, at.expand(-1, -1, 3, -1, -1))
        mixture = Mixture(mixture.log_weights, mean, log_scale, coupling)
        uniform = noise.uniform(PIXELS, (mixture.mean.shape[2], *parameters.shape[2:])) + 2.0**-25
        spread = mixture.log_scale.exp() * uniform.logit().unsqueeze(1)
        drawn: list[Tensor] = []
        for c, mean in enumerate(mixture.mean.unbind(2)):
            x = [self.to_inputs(level) for level in drawn]
            if mixture.coupling is not None:
                mean = _coupled(mixture, mixture.mean.unbind(2), x, c)
            drawn.append(nearest_level(mean + spread[:, :, c], levels=self.levels))
        return torch.cat(drawn, 1)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        """Exact for one channel, for red, and where nothing is coupled; for pictures only.

        Green and blue take each component's mean of the channels before, as if the ends of the grey scale were far: exactly
        it would be a sum over all levels of red and green. Within 0.02 of it where scales are below e^-3 and components
        keep to [-0.8, 0.8]; the error is larger the more mass is cut off at either end.
        """
        mixture = self._split(parameters)
        levels: list[Tensor] = []
        for c, mean in enumerate(mixture.mean.unbind(2)):
            if mixture.coupling is not None:
                mean = _coupled(mixture, mixture.mean.unbind(2), [2 * level - 1 for level in levels], c)
            levels.append(expected_level(mean, mixture.log_scale[:, :, c], count=self.levels))
        return torch.einsum("bmhw,bmchw->bchw", mixture.log_weights.exp(), torch.stack(levels, 2))

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        m, channels = self.components, len(mean_levels)
        # Spread about one centre: components that started alike would stay alike.
        spread = (torch.linspace(-0.5, 0.5, m) if m > 1 else torch.zeros(1)).to(mean_levels.device).view(-1, 1, 1, 1)

        def parameters(centre: Tensor) -> Tensor:
            means = (centre + spread).flatten(0, 1)
            planes = self.parameters(channels) - m - 2 * len(means)  # nothing is coupled
            zeros = means.new_zeros(m + planes, *means.shape[1:])
            return torch.cat((zeros[:m], means, torch.full_like(means, -2.0), zeros[m:])).unsqueeze(0)

        return self.parameters_with_mean(mean_levels, parameters, self.mean)

    def _split(self, parameters: Float[Tensor, "B P H W"]) -> Mixture:
        flat, m = parameters.float(), self.components
        planes = flat.shape[1] // m  # 1 + 2C of them, or 10 for RGB
        channels = 3 if planes == 10 else (planes - 1) // 2
        sizes, n = (flat.shape[0], m, channels, *flat.shape[2:]), m * channels
        mean, log_scale = flat[:, m : m + n].reshape(sizes), flat[:, m + n : m + 2 * n].reshape(sizes)
        coupling = flat[:, m + 2 * n :].reshape(sizes).tanh() if channels == 3 else None
        return Mixture(flat[:, :m].log_softmax(1), mean, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE), coupling)


def _coupled(
    mixture: Mixture, mean: list[Tensor] | tuple[Tensor, ...], x: list[Tensor] | tuple[Tensor, ...], c: int
) -> Tensor:
    """The mean of channel c, moved by the channels before it."""
    assert mixture.coupling is not None
    a, b, g = mixture.coupling.unbind(2)
    return mean[0] if c == 0 else mean[1] + a * x[0] if c == 1 else mean[2] + b * x[0] + g * x[1]
