"""The likelihood of a mixture of discretised logistics, forward and backward, against VDVAE's."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.benchmarks.cases.case import Found, relative
from tests.benchmarks.paired import Turn, in_this_process
from tests.benchmarks.peers import of_vdvae
from vaejob.config import LikelihoodConfig
from vaejob.likelihood.pixels import make_pixels

BATCH, SIDE, COMPONENTS, REPEATS = 16, 32, 10, 8
EAGER, COMPILED = "ours", "ours compiled"
TOLERANCE = 2e-4
"""Of values and gradients from those in float64, relative."""


class Likelihood(NamedTuple):
    """One way to the same number, and the order of its planes in ours'."""

    nats: Callable[[Tensor], Tensor]
    """Of each image, negative, given the logits [B, P, H, W]."""
    order: Tensor

    def with_slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of each image, and the gradient of their sum, as ours orders planes."""
        own = logits[:, self.order].contiguous().requires_grad_()
        nats = self.nats(own)
        (slope,) = torch.autograd.grad(nats.sum(), own)
        return nats.detach(), slope[:, self.order.argsort()]

    def repeated(self, logits: Tensor) -> Turn:
        own = logits[:, self.order].contiguous().requires_grad_()

        def work() -> int:
            for _ in range(REPEATS):
                self.nats(own).sum().backward()
                own.grad = None
            return REPEATS * BATCH

        return in_this_process(work)

    def kept(self, logits: Tensor) -> float:
        """What waits for the backward pass, in multiples of the logits; the logits themselves count once."""
        own, storages = logits[:, self.order].contiguous().requires_grad_(), dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            nats = self.nats(own)
        del nats
        return sum(storages.values()) / own.nbytes


def mixture(options: argparse.Namespace, folder: str) -> Found:
    torch.manual_seed(0)
    levels = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    levels[:2] = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)  # both open ends
    logits = likely_logits(levels)
    pixels = make_pixels(LikelihoodConfig(pixels="discretized-logistic-mixture", components=COMPONENTS))
    own_order, their_order, theirs = torch.arange(logits.shape[1]), published_order(), published_nats(levels)
    ways = {
        "VDVAE": Likelihood(theirs, their_order),
        "VDVAE's, compiled": Likelihood(torch.compile(theirs), their_order),
        EAGER: Likelihood(lambda own: -pixels.log_prob(own, levels), own_order),
        COMPILED: Likelihood(torch.compile(lambda own: -pixels.log_prob(own, levels)), own_order),
    }
    found = Found(
        case="mixture",
        title=f"Mixture of {COMPONENTS} discretised logistics, forward and backward, {BATCH} images of {SIDE}x{SIDE}x3",
        peer="VDVAE",
        goals={EAGER: 4.0, COMPILED: 4.0},
    )
    exact, slope = Likelihood(lambda own: brute_force(own, levels), own_order).with_slope(logits.double())
    for name, way in ways.items():
        apart, slopes_apart = (
            relative(a.double(), b) for a, b in zip(way.with_slope(logits), (exact, slope), strict=True)
        )
        assert apart < TOLERANCE, (name, apart)
        assert slopes_apart < TOLERANCE, (name, slopes_apart)
        found.proofs.append(
            f"{name}: values within {apart:.0e}, gradients within {slopes_apart:.0e} of plain float64; "
            f"keeps {way.kept(logits):.2f} x the logits for backward"
        )
    return found.measure({name: way.repeated(logits) for name, way in ways.items()}, options)


def likely_logits(levels: Tensor) -> Tensor:
    """Components around the pixels, as a trained decoder has them: neither code is to meet only its tails."""
    shape = (BATCH, COMPONENTS, 3, SIDE, SIDE)
    means = (levels[:, None] / 127.5 - 1) + 0.05 * torch.randn(shape)
    scales, couplings = -2.5 + 0.3 * torch.randn(shape), 0.01 * torch.randn(shape)
    parts = (torch.randn(BATCH, COMPONENTS, SIDE, SIDE), *(part.flatten(1, 2) for part in (means, scales, couplings)))
    return torch.cat(parts, 1)


def published_nats(levels: Tensor) -> Callable[[Tensor], Tensor]:
    _, _, helpers = of_vdvae.published()
    x = levels.permute(0, 2, 3, 1).float() / 127.5 - 1
    return lambda logits: helpers.discretized_mix_logistic_loss(x, logits.permute(0, 2, 3, 1)) * x[0].numel()


def published_order() -> Tensor:
    """Our plane at each place of theirs: they go by channel, then mean, scale, coupling, then component."""
    m = COMPONENTS
    ours = torch.arange(m, 10 * m).view(3, m, 3)  # mean, scale, coupling; component; channel
    return torch.cat((torch.arange(m), ours.permute(2, 0, 1).flatten()))


def brute_force(logits: Tensor, levels: Tensor) -> Tensor:
    """By the definition: each component's mass of each bin is a difference of two sigmoids."""
    m, x = COMPONENTS, levels.double() / 127.5 - 1
    mean, log_scale, coupling = logits[:, m:].unflatten(1, (3, m, 3)).unbind(1)
    a, b, c = coupling.tanh().unbind(2)
    red, green, _ = x[:, None].unbind(2)
    moved = torch.stack((mean[:, :, 0], mean[:, :, 1] + a * red, mean[:, :, 2] + b * red + c * green), 2)
    upper, lower = (((x[:, None] + step / 255 - moved) / log_scale.exp()).sigmoid() for step in (1, -1))
    top, bottom = (levels[:, None] == end for end in (255, 0))
    mass = torch.where(top, 1.0, upper) - torch.where(bottom, 0.0, lower)
    return -(logits[:, :m].log_softmax(1) + mass.log().sum(2)).logsumexp(1).flatten(1).sum(1)
