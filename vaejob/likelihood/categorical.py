"""A probability of its own for each level. Shapes: B images, C H W channels and pixels, P = levels * C."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.likelihood.levels import GreyLevels
from vaejob.likelihood.logistic import log_mass
from vaejob.model.noise import PIXELS, Noise


@dataclass(frozen=True, kw_only=True)
class Categorical(GreyLevels):
    """Softmax over the levels (PixelRNN, arXiv 1601.06759); the parameters are its logits."""

    def parameters(self, channels: int) -> int:
        return self.levels * channels

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        log_mass = self._logits(parameters).log_softmax(1)
        return log_mass.gather(1, levels.long().unsqueeze(1)).flatten(1).sum(1)

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        below = self._logits(parameters).softmax(1).cumsum(1)[:, :-1]
        uniform = noise.uniform(PIXELS, tuple(below.shape[2:]))
        return (uniform.unsqueeze(1) >= below).sum(1).to(torch.uint8)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        mass = self._logits(parameters).softmax(1)
        grey = torch.linspace(0, 1, self.levels, device=mass.device)
        return torch.einsum("bkchw,k->bchw", mass, grey)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        # A broad logistic about each mean, so that no level starts out of reach.
        every = torch.arange(self.levels, device=mean_levels.device).view(-1, 1, 1, 1)

        def logits(centre: Tensor) -> Tensor:
            return log_mass(centre, torch.full_like(centre, -1.0), every, count=self.levels).flatten(0, 1).unsqueeze(0)

        return self.parameters_with_mean(mean_levels, logits, self.mean)

    def _logits(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B K C H W"]:
        return parameters.float().reshape(parameters.shape[0], self.levels, -1, *parameters.shape[2:])
