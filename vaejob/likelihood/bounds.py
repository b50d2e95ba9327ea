"""Bounds on log p(x), image by image, in nats.

Shapes: B images, L stochastic layers, K importance samples, C H W channels and pixels.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vaejob.likelihood.pixels import ObservationModel
from vaejob.model.gaussian import kl
from vaejob.model.noise import Noise
from vaejob.model.vae import VAE, Inference


class BoundTerms(NamedTuple):
    """The two halves of the negative ELBO of each image."""

    distortion: Float[Tensor, " B"]  # -log p(x | z)
    layer_rates: Float[Tensor, "B L"]  # KL(q || p) of each layer, given the sampled layers above

    @property
    def rate(self) -> Float[Tensor, " B"]:
        return self.layer_rates.sum(1)


class NegativeELBO(nn.Module):
    """What DistributedDataParallel wraps: one forward, through encoder, decoder and likelihood."""

    def __init__(self, vae: VAE, pixels: ObservationModel) -> None:
        super().__init__()
        self.vae = vae
        self.pixels = pixels

    def forward(self, levels: Tensor, noise_keys: Int64[Tensor, " B"]) -> BoundTerms:
        """One code per image; the divergence of each layer in closed form."""
        layers, parameters = self.vae.infer(self.pixels.to_inputs(levels), Noise(noise_keys))
        rates = [kl(layer.posterior, layer.prior) for layer in layers]
        return BoundTerms(-self.pixels.log_prob(parameters, levels), torch.stack(rates, dim=1))


def objective(terms: BoundTerms, *, beta: float, free_bits_nats: float) -> Float[Tensor, " B"]:
    """What is minimised for each image; it is the negative ELBO only where beta is 1 and no bits are free."""
    return terms.distortion + beta * terms.layer_rates.clamp(min=free_bits_nats).sum(1)


class ImportanceBound(NamedTuple):
    """The K-sample bound of each image, and how many samples its weights are worth."""

    log_likelihood: Float[Tensor, " B"]
    effective_samples: Float[Tensor, " B"]  # (sum w)^2 / sum w^2, between 1 and K


@torch.no_grad()
def importance_bound(
    vae: VAE, pixels: ObservationModel, levels: Tensor, noise: Noise, *, samples: int, chunk: int = 16
) -> ImportanceBound:
    """log 1/K sum_k p(x, z_k) / q(z_k | x) by Burda et al.; memory grows with chunk, the draws do not depend on it."""
    assert samples >= 1, samples
    encoding = vae.encode(pixels.to_inputs(levels))
    # sum w = s e^m and sum w^2 = s2 e^2m, where m is the largest log w so far: nothing overflows
    m = torch.full((len(levels),), -math.inf, dtype=torch.float64, device=levels.device)
    s, s2 = torch.zeros_like(m), torch.zeros_like(m)
    for start in range(0, samples, chunk):
        draws = range(start, min(start + chunk, samples))
        log_w = _log_weights(vae.draw(encoding, noise.folds(draws), samples=len(draws)), pixels, levels)
        log_w = log_w.double().view(len(draws), len(levels))
        new_m = torch.maximum(m, log_w.amax(0))
        w, kept = (log_w - new_m).exp(), (m - new_m).exp()
        m, s, s2 = new_m, s * kept + w.sum(0), s2 * kept.square() + w.square().sum(0)
    return ImportanceBound(m + s.log() - math.log(samples), s.square() / s2)


def _log_weights(inference: Inference, pixels: ObservationModel, levels: Tensor) -> Float[Tensor, " KB"]:
    """log p(x, z) - log q(z | x) of the codes as drawn: a divergence in closed form here would not give a bound."""
    draws = len(inference.parameters) // max(len(levels), 1)
    total = pixels.log_prob(inference.parameters, levels.repeat(draws, 1, 1, 1))
    for layer in inference.layers:
        total = total + layer.prior.log_prob(layer.z) - layer.posterior.log_prob(layer.z)
    return total
