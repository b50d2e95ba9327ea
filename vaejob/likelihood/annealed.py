"""Annealed importance sampling of log p(x), from below and from above, to tell how tight a model's bounds are.

Chains go from the prior to the posterior through p(z) p(x | z)^t, t from 0 to 1, by Hamiltonian transitions (Neal, 2001;
Wu et al., arXiv 1611.04273): their weights estimate p(x) without bias, so that the log of their mean is below log p(x) in
expectation. Chains that go back from an exact sample of the posterior estimate 1 / p(x), and give a bound from above
(Grosse et al., arXiv 1511.02543); exact samples are known where x was drawn from the model itself, with its z.

Shapes: B images, N chains per image, T temperatures.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaejob.errors import ConfigError
from vaejob.likelihood.pixels import ObservationModel
from vaejob.model.noise import Noise
from vaejob.model.vae import VAE

# Streams of a chain's noise, beyond those of any model's layers.
START = 1024  # the first code, from the prior
MOVES = 1026  # MOVES + 2t, MOVES + 2t + 1: the momentum and the acceptance of the move at temperature t

ACCEPTED = 0.65
"""Share of moves that step sizes aim at: the best for Hamiltonian moves in high dimension (Neal, 2011)."""
FIRST_STEP = 0.3
"""In units of the prior's standard deviation."""


class AnnealedBound(NamedTuple):
    """A stochastic bound on log p(x) of each image, in nats: from below for chains from the prior, else from above."""

    log_likelihood: Float64[Tensor, " B"]
    effective_samples: Float64[Tensor, " B"]  # of the N chains' weights
    accepted: Float64[Tensor, " B"]  # share of the moves


class _Chains(NamedTuple):
    """Where all chains are, with log p(x | z) there and its slope."""

    z: Float[Tensor, " NB *latent"]
    log_likelihood: Float64[Tensor, " NB"]
    slope: Float[Tensor, " NB *latent"]


class _Target(NamedTuple):
    """p(z) p(x | z)^t of a batch, each image repeated for its chains; codes are of the model's own dtype."""

    vae: VAE
    pixels: ObservationModel
    levels: Tensor
    dtype: torch.dtype

    def from_prior(self, noise: Noise) -> _Chains:
        return self.at(noise.normal(START, self.vae.latent_shape).to(self.dtype))

    def at(self, z: Float[Tensor, " NB *latent"]) -> _Chains:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            nats = self.pixels.log_prob(self.vae.decode(z), self.levels)
            (slope,) = torch.autograd.grad(nats.sum(), z)
        return _Chains(z.detach(), nats.detach().double(), slope)


@torch.no_grad()
def annealed_bound(
    vae: VAE,
    pixels: ObservationModel,
    levels: Tensor,
    noise: Noise,
    *,
    temperatures: int,
    chains: int,
    leapfrog_steps: int = 10,
    step_size: float | None = None,
    reverse_from: Float[Tensor, " B *latent"] | None = None,
) -> AnnealedBound:
    """Bounds log p(x) from below; or from above, by chains that start at reverse_from, exact samples of p(z | x).

    Without a step_size, a first run of the chains with other noise finds one for each image and temperature, by the share
    of moves accepted there; it is then held, so that the bounds stay bounds. The noise belongs to the images: the same
    images give the same numbers. Raises ConfigError for a model with more than one stochastic layer or a learnt prior.
    """
    assert temperatures >= 1, temperatures
    assert chains >= 1, chains
    if not len(levels):
        nothing = torch.zeros(0, dtype=torch.float64, device=levels.device)
        return AnnealedBound(nothing, nothing, nothing)
    betas = _betas(temperatures)
    target = _Target(vae, pixels, levels.repeat(chains, 1, 1, 1), dtype=_checked(vae, pixels, levels, noise))
    if step_size is None:
        steps = _tuned_steps(target, noise.fold(0).folds(range(chains)), betas, leapfrog_steps, images=len(levels))
    else:
        steps = torch.full((temperatures, len(levels)), step_size, dtype=torch.float64, device=levels.device)
    if reverse_from is None:
        own = noise.fold(1).folds(range(chains))
        here, order = target.from_prior(own), range(1, temperatures)
    else:
        own = noise.fold(2).folds(range(chains))
        here = target.at(reverse_from.repeat(chains, *(1,) * (reverse_from.ndim - 1)))
        order = range(temperatures - 1, 0, -1)
    log_w, accepted = torch.zeros_like(here.log_likelihood), torch.zeros_like(here.log_likelihood)
    # The chain is at z_t, which the move at temperature t left behind; its weight gains (beta_t+1 - beta_t) log p(x | z_t).
    for gain, t in _legs(betas, order):
        log_w += gain * here.log_likelihood
        if t is not None:
            here, share = _move(target, here, own, t, betas[t], steps[t].repeat(chains), leapfrog_steps)
            accepted += share
    return _bound(
        log_w.view(chains, -1),
        accepted.view(chains, -1) / max(len(order), 1),
        above=reverse_from is not None,
    )


def _legs(betas: list[float], order: range) -> Iterator[tuple[float, int | None]]:
    """What each place of a chain counts for, and the temperature of the move that leaves it; the last is not left."""
    gains = [high - low for low, high in itertools.pairwise(betas)]
    if order.step < 0:
        gains.reverse()
    return zip(gains, [*order, None], strict=True)


def _bound(log_w: Float64[Tensor, "N B"], accepted: Float64[Tensor, "N B"], *, above: bool) -> AnnealedBound:
    # Chains backwards have weights whose inverse is an estimate of 1 / p(x).
    signed = -log_w if above else log_w
    mean = signed.logsumexp(0) - math.log(len(log_w))
    ess = (2 * signed.logsumexp(0) - (2 * signed).logsumexp(0)).exp()
    return AnnealedBound(-mean if above else mean, ess, accepted.mean(0))


def _move(
    target: _Target,
    here: _Chains,
    noise: Noise,
    t: int,
    beta: float,
    step: Float64[Tensor, " NB"],
    leapfrog_steps: int,
) -> tuple[_Chains, Float64[Tensor, " NB"]]:
    """One Hamiltonian transition that leaves p(z) p(x | z)^beta as it is, and how likely each chain was to accept it."""
    shape = tuple(here.z.shape[1:])
    size = _beside(step, here.z)
    momentum = noise.normal(MOVES + 2 * t, shape).to(here.z.dtype)
    there, p = here, momentum + size / 2 * _force(here, beta)
    for i in range(leapfrog_steps):
        there = target.at(there.z + size * p)
        last = i == leapfrog_steps - 1
        p = p + (size / 2 if last else size) * _force(there, beta)
    gained = _log_density(there, p, beta) - _log_density(here, momentum, beta)
    likely = gained.clamp(max=0).exp().nan_to_num(nan=0.0)  # a trajectory that diverged is refused
    accept = noise.uniform(MOVES + 2 * t + 1, (1,)).flatten() < likely
    kept = _Chains(*(torch.where(_beside(accept, new), new, old) for new, old in zip(there, here, strict=True)))
    return kept, likely


def _force(at: _Chains, beta: float) -> Float[Tensor, " NB *latent"]:
    return beta * at.slope - at.z


def _log_density(at: _Chains, momentum: Float[Tensor, " NB *latent"], beta: float) -> Float64[Tensor, " NB"]:
    """log p(z) + beta log p(x | z) + log N(momentum; 0, 1), but for constants."""
    squares = at.z.double().square() + momentum.double().square()
    return beta * at.log_likelihood - squares.flatten(1).sum(1) / 2


def _tuned_steps(
    target: _Target, noise: Noise, betas: list[float], leapfrog_steps: int, *, images: int
) -> Float64[Tensor, "T B"]:
    """Step size of the move at each temperature, for each image: larger after moves accepted too often, else smaller."""
    here = target.from_prior(noise)
    chains = len(noise.keys) // images
    step = torch.full((images,), FIRST_STEP, dtype=torch.float64, device=target.levels.device)
    steps = [step]
    for t in range(1, len(betas) - 1):
        here, likely = _move(target, here, noise, t, betas[t], step.repeat(chains), leapfrog_steps)
        step = step * (likely.view(chains, images).mean(0) - ACCEPTED).mul(0.5).exp()
        steps.append(step)
    return torch.stack(steps)


def _betas(temperatures: int) -> list[float]:
    """From 0 to 1 in so many legs, short at both ends: a logistic from -4 to 4, rescaled (Grosse et al.)."""
    logistic = [1 / (1 + math.exp(-4 * (2 * t / temperatures - 1))) for t in range(temperatures + 1)]
    return [(value - logistic[0]) / (logistic[-1] - logistic[0]) for value in logistic]


def _checked(vae: VAE, pixels: ObservationModel, levels: Tensor, noise: Noise) -> torch.dtype:
    """What the model computes codes in. Raises ConfigError for a model that annealing does not know."""
    layers = vae.draw(vae.encode(pixels.to_inputs(levels[:1])), Noise(noise.keys[:1])).layers
    if len(layers) != 1:
        raise ConfigError(f"the model has {len(layers)} stochastic layers; annealing is for models with 1")
    prior = layers[0].prior
    if prior.mean.any() or prior.log_std.any():
        raise ConfigError("the model's prior is learnt; annealing starts from a standard normal")
    return layers[0].z.dtype


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """One value per chain, to be combined with the code's elements."""
    values = values if values.dtype == torch.bool else values.to(like.dtype)
    return values.view(-1, *(1,) * (like.ndim - 1))
