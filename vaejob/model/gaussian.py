"""Diagonal Gaussians over the code of each image. Shapes: B images."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Gaussian(NamedTuple):
    """Independent normals, one per dimension of the code; never narrower than float32, whatever the network computes in."""

    mean: Float[Tensor, " B *latent"]
    log_std: Float[Tensor, " B *latent"]

    def sample(self, eps: Float[Tensor, " B *latent"]) -> Float[Tensor, " B *latent"]:
        return self.mean + self.log_std.exp() * eps

    def log_prob(self, z: Float[Tensor, " B *latent"]) -> Float[Tensor, " B"]:
        """Nats, summed over the code."""
        z, mean, log_std = map(_channels_last, (z, *self))
        eps = (z - mean) * (-log_std).exp()
        return -_summed(0.5 * eps.square() + log_std + 0.5 * math.log(2 * math.pi))

    def repeat(self, times: int) -> "Gaussian":
        """The whole batch, times over: the second copy follows the first."""
        if times == 1:
            return self
        sizes = (times,) + (1,) * (self.mean.ndim - 1)
        return Gaussian(self.mean.repeat(sizes), self.log_std.repeat(sizes))


def gaussian(
    mean: Float[Tensor, " B *latent"], log_std: Float[Tensor, " B *latent"], *, bounded: bool = False
) -> Gaussian:
    """A Gaussian of what a network put out, widened to float32 where autocast left bfloat16.

    bounded: the standard deviation stays between e^-5 and e^5, and is 1 at 0 (after NVAE), so that an outlier cannot make
    the rate overflow; networks whose last units are bounded can do without.
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, log_std = mean.to(wide), log_std.to(wide)
    return Gaussian(mean, 5 * torch.tanh(log_std / 5) if bounded else log_std)


def standard_normal(like: Float[Tensor, " B *latent"]) -> Gaussian:
    return Gaussian(torch.zeros_like(like), torch.zeros_like(like))


def kl(q: Gaussian, p: Gaussian) -> Float[Tensor, " B"]:
    """KL(q || p) in nats, summed over the code."""
    # log(sp / sq) + (sq^2 + (mq - mp)^2) / (2 sp^2) - 1/2, with d = log(sq / sp)
    q_mean, q_log_std, p_mean, p_log_std = map(_channels_last, (*q, *p))
    d = q_log_std - p_log_std
    shift = (q_mean - p_mean) * (-p_log_std).exp()
    return _summed(0.5 * (torch.expm1(2 * d) + shift.square()) - d)


def _channels_last(code: Float[Tensor, " B *latent"]) -> Float[Tensor, " B ..."]:
    """A map's axes in the order in which it lies in memory: compiled, gradients come in the order of axes."""
    return code.movedim(1, -1) if code.ndim == 4 else code


def _summed(nats: Float[Tensor, " B *latent"]) -> Float[Tensor, " B"]:
    """Over the code, in the order in which it lies in memory: flattened first, maps whose channels lie side by side would be
    copied, and a compiled sum would jump from one to the next."""
    return nats.sum(tuple(range(1, nats.ndim)))
