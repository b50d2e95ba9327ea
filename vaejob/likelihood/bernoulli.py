"""Bernoulli pixels, and the continuous Bernoulli. Shapes: B images, C H W channels and pixels, P = C logits."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from vaejob.likelihood.levels import GreyLevels, nearest_level, to_grey
from vaejob.model.noise import BINARIZE, PIXELS, Noise


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Binary pixels; the parameter is the logit of one."""

    binarize: Literal["threshold", "static", "dynamic"] = "threshold"
    """static and dynamic differ only in the noise that the caller passes: one per image, or one per use."""
    levels = 2
    is_density = False
    density_bits_correction = 0.0

    def parameters(self, channels: int) -> int:
        return channels

    def to_levels(self, images: UInt8[Tensor, "B C H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        if self.binarize == "threshold":
            return (images >= 128).to(torch.uint8)
        return (noise.uniform(BINARIZE, tuple(images.shape[1:])) < images / 255).to(torch.uint8)

    def to_inputs(self, levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return levels.float()

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        # A compiled score, whose loops keep what they multiply in registers; in eager mode each product would be memory.
        if is_compiling() and not is_exporting() and not torch.is_grad_enabled():
            logits = parameters.float().flatten(1)
            ones = (levels.flatten(1) * logits).sum(1)
            return ones - logits.clamp(min=0).sum(1) - sum_of_log1p(logits.abs().neg().exp())
        # log sigma(l) for a one, log sigma(-l) for a zero; log sigma(l) = -softplus(-l). In place where nothing is recorded:
        # what scoring costs besides the network is the memory that passes here.
        sign = levels.float().mul_(-2).add_(1)
        return F.softplus(sign.mul_(parameters.float())).flatten(1).sum(1).neg()

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        return (noise.uniform(PIXELS, tuple(parameters.shape[1:])) < self.mean(parameters)).to(torch.uint8)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        return parameters.float().sigmoid()

    def to_uint8(self, pixels: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
        return to_grey(pixels, levels=self.levels)

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        return mean_levels.float().clamp(0.001, 0.999).logit()


def sum_of_log1p(u: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Of u in [0, 1]: sixteen to a logarithm, for a compiler, which keeps their product in registers.

    1 + u is rounded, by less than 2^-24, which is what a term of the sum is rounded by too.
    """
    whole = u.shape[1] // 16 * 16
    products = (1 + u[:, :whole]).view(len(u), 16, whole // 16).prod(1)
    return products.log().sum(1) + u[:, whole:].log1p().sum(1)


@dataclass(frozen=True, kw_only=True)
class ContinuousBernoulli(GreyLevels):
    """The density l e^(l x) / (e^l - 1) of x = level / (levels - 1) in [0, 1] (arXiv 1907.06845); it may exceed 1."""

    @property
    def is_density(self) -> bool:
        return True

    def parameters(self, channels: int) -> int:
        return channels

    def log_density(self, parameters: Float[Tensor, "B P H W"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        # l x + log(l / (e^l - 1)) = l (x - 1/2) - log(sinh(u) / u), u = l / 2; log(sinh(u) / u) = |u| + log((1 - e^-2|u|) / 2|u|)
        logit = parameters.float()
        u = logit.abs() / 2
        small, large = u.clamp(max=0.3), u.clamp(min=0.3)
        near = small.square() / 6 - small**4 / 180 + small**6 / 2835
        far = torch.log1p(-(-2 * large).exp()) - (2 * large).log()
        # |u| joins x - 1/2 first: far from 0 the two cancel.
        side = torch.where(logit < 0, x, 1 - x)
        nats = torch.where(u < 0.3, logit * (x - 0.5) - near, -logit.abs() * side - far)
        return nats.flatten(1).sum(1)

    def support(
        self, parameters: Float[Tensor, "B P H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        zero = torch.zeros_like(parameters.float())
        return zero, zero + 1

    def log_prob(self, parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        return self.log_density(parameters, levels.float() / (self.levels - 1))

    def sample(self, parameters: Float[Tensor, "B P H W"], noise: Noise) -> UInt8[Tensor, "B C H W"]:
        # By the inverse of F(x) = (1 - e^(-r x)) / (1 - e^-r), r = |l|, counted from the denser end.
        logit, uniform = parameters.float(), noise.uniform(PIXELS, tuple(parameters.shape[1:]))
        rate = logit.abs().clamp(min=1e-4)
        x = -torch.log1p(uniform * torch.expm1(-rate)) / rate
        return nearest_level(2 * torch.where(logit < 0, x, 1 - x) - 1, levels=self.levels)

    def mean(self, parameters: Float[Tensor, "B P H W"]) -> Float[Tensor, "B C H W"]:
        # 1/2 + (coth u - 1 / u) / 2, u = l / 2
        u = parameters.float() / 2
        safe = torch.where(u.abs() < 0.3, 1.0, u)
        near = u / 3 - u**3 / 45 + 2 * u**5 / 945
        return 0.5 + torch.where(u.abs() < 0.3, near, 1 / safe.tanh() - 1 / safe) / 2

    def initial_parameters(self, mean_levels: Float[Tensor, "C H W"]) -> Float[Tensor, "P H W"]:
        return self.parameters_with_mean(mean_levels, lambda logit: logit, self.mean, within=256.0)
