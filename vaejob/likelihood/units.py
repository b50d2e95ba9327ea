"""Nats, bits and bits per dimension."""

import math

from vaejob.config import LikelihoodConfig

NATS_PER_BIT = math.log(2)


def bits_per_dim(nats: float, dims: int | float) -> float:
    """Both summed over the same images, or both of one image; dims counts pixels times channels."""
    return nats / (dims * NATS_PER_BIT)


def nats_per_bit_per_dim(dims: int | float) -> float:
    """What one bit per dimension is worth: 543.43 nats for MNIST, 2129.35 for CIFAR-10."""
    return dims * NATS_PER_BIT


def density_bits(likelihood: LikelihoodConfig) -> float | None:
    """What a density's bits/dim lack to those of levels, were it times bin width a mass; None for probabilities."""
    return math.log2(2**likelihood.bits - 1) if likelihood.pixels in ("gaussian", "continuous-bernoulli") else None
