"""Sums over images, exact and therefore the same however the images are split over workers; one division at the end.

Each image's nats are rounded to a multiple of 2^-16, and their square is carried as a multiple of 2^12 plus the
remainder, rounded to a multiple of 2^-16. Sums of such multiples are exact in float64 below 2^37 nats (10^7 images of
10^4 nats) and for any square up to 2^26 images, so addition is associative and no order changes a digit.
What is known of importance weights and of codes is rounded likewise, to units of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from vaejob.likelihood.bounds import BoundTerms
from vaejob.model.vae import Layer
from vaejob.totals import OF_WEIGHTS, QUANTITIES, LikelihoodTotals, Quantity

__all__ = ["LayerTotals", "LikelihoodTotals", "Quantity", "RunningTotals", "layer_totals"]

ACTIVE_VARIANCE = 0.01
COLLAPSED_NATS = 0.01

BATCHES_HELD = 64

_GRID = 2.0**-16
_COARSE = 2.0**12
_FINE = 2.0**-30  # 1 / ESS - 1 / K, which is at most 1
_CODE = 2.0**-20  # a code's mean


class RunningTotals:
    """Totals that stay on the device: adding never waits for it; images and dims are counted from shapes."""

    def __init__(self, *, dims_per_image: int, device: torch.device | str) -> None:
        self._dims_per_image = dims_per_image
        self._images = 0
        # Batches whose terms are still to be added: many at once cost little more than one, and sums are exact in any order.
        self._held: list[tuple[Tensor, Tensor, Tensor | None]] = []
        # Rows: nats, coarse squares, their remainders, and in each column of the last row the images left out.
        self._sums = torch.zeros(4, len(QUANTITIES), dtype=torch.float64, device=device)
        # As the fields of LikelihoodTotals named in OF_WEIGHTS.
        self._weights = torch.zeros(len(OF_WEIGHTS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        terms: BoundTerms,
        *,
        negative_bound: Float[Tensor, " B"] | None = None,
        effective_samples: Float[Tensor, " B"] | None = None,
        samples: int = 1,
    ) -> None:
        """Without another bound it is that of the terms: the negative ELBO, to which two halves add up exactly, or IWAE.

        effective_samples is of the weights of so many samples as were drawn for the bound.
        """
        bound = terms.negative_bound if negative_bound is None else negative_bound
        if self._held and (bound is None) != (self._held[0][2] is None):
            self._add_held()
        self._held.append((terms.distortion.detach(), terms.rate.detach(), None if bound is None else bound.detach()))
        self._images += len(terms.distortion)
        if effective_samples is not None:
            finite = self._add_held()[-len(terms.distortion) :]
            self._add_weights(effective_samples.double(), finite, samples=samples)
        elif len(self._held) == BATCHES_HELD:
            self._add_held()

    def _add_held(self) -> Bool[Tensor, " B"]:
        """Whether the terms of each image are finite."""
        distortions, rates, bounds = zip(*self._held, strict=True)
        self._held = []
        distortion, rate = _to_grid(torch.cat(distortions)), _to_grid(torch.cat(rates))
        bound = distortion + rate if bounds[0] is None else _to_grid(torch.cat(bounds))
        nats = torch.stack((distortion, rate, bound))
        finite = nats.isfinite().all(0)
        nats = torch.where(finite, nats, 0.0)
        squares = nats.square()
        coarse = (squares / _COARSE).round() * _COARSE
        left_out = (~finite).double().expand_as(nats)
        self._sums += torch.stack((nats, coarse, _to_grid(squares - coarse), left_out)).sum(2)
        return finite

    def _add_weights(self, ess: Float[Tensor, " B"], finite: Bool[Tensor, " B"], *, samples: int) -> None:
        inverse = torch.where(finite, 1 / ess, 0.0)
        lacking = torch.where(finite, _to_grid(1 / ess - 1 / samples, unit=_FINE), 0.0)
        sums = torch.stack((finite.double(), torch.where(finite, _to_grid(ess), 0.0), lacking)).sum(1)
        largest = torch.cat((self._weights[3:], inverse)).amax()
        self._weights = torch.cat((self._weights[:3] + sums, largest[None]))

    def to_host(self) -> LikelihoodTotals:
        """Waits for the device."""
        if self._held:
            self._add_held()
        nats, squares, rests, left_out = self._sums.tolist()
        numbers: dict[str, Any] = {"non_finite": int(left_out[0])}
        for name, *sums in zip(QUANTITIES, nats, squares, rests, strict=True):
            numbers |= zip((f"{name}_nats", f"{name}_squares", f"{name}_squares_rest"), sums, strict=True)
        numbers |= zip(OF_WEIGHTS, self._weights.tolist(), strict=True)
        numbers["weighed_images"] = int(numbers["weighed_images"])
        return LikelihoodTotals(images=self._images, dims=self._images * self._dims_per_image, **numbers)

    def clear(self) -> None:
        self._images = 0
        self._held.clear()
        self._sums.zero_()
        self._weights.zero_()


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTotals:
    """What is known of each stochastic layer, the top one first; totals of workers add up. U units of a layer's code."""

    images: int = 0
    rate_nats: tuple[float, ...] = ()
    """Sum of KL(q || p) of each layer."""
    means: tuple[NDArray[np.float64], ...] = ()
    """[U] for each layer: sum of m = E_q[u | x] of each unit u, the mean over draws of the layers it is given."""
    products: tuple[NDArray[np.float64], ...] = ()
    """[U] for each layer: sum of m * m, each factor of draws of its own, so that their noise averages out."""

    def __add__(self, other: "LayerTotals") -> "LayerTotals":
        if not (self.images and other.images):
            return self if self.images else other
        assert len(self.rate_nats) == len(other.rate_nats), (self, other)
        return LayerTotals(
            images=self.images + other.images,
            rate_nats=tuple(a + b for a, b in zip(self.rate_nats, other.rate_nats, strict=True)),
            means=tuple(a + b for a, b in zip(self.means, other.means, strict=True)),
            products=tuple(a + b for a, b in zip(self.products, other.products, strict=True)),
        )

    @property
    def rates(self) -> list[float]:
        """Nats per image of each layer."""
        return [nats / self.images for nats in self.rate_nats]

    @property
    def units(self) -> list[int]:
        """Elements of each layer's code."""
        return [len(means) for means in self.means]

    @property
    def active_units(self) -> list[int]:
        """Units with Var_x(E_q[u | x]) > 0.01, by Burda et al.; of each layer."""
        sums = zip(self.means, self.products, strict=True)
        return [int((p / self.images - (m / self.images) ** 2 > ACTIVE_VARIANCE).sum()) for m, p in sums]

    def collapsed(self) -> list[str]:
        """A line for each layer that carries nothing of the image, or may carry nothing.

        Its rate bounds what a layer knows of the image. A code of small scale may know much without an active unit, one whose
        posterior is the same for all images has a rate wherever that is not the prior.
        """
        lines = []
        for layer, (rate, active, units) in enumerate(zip(self.rates, self.active_units, self.units, strict=True)):
            if rate < COLLAPSED_NATS or not active:
                lines.append(
                    f"stochastic layer {layer + 1} of {len(self.rates)} "
                    f"{'has collapsed' if rate < COLLAPSED_NATS else 'may carry nothing'}: "
                    f"{rate:.4f} nats of rate per image, {active} of {units} units active"
                )
        return lines


@torch.no_grad()
def layer_totals(layers: Sequence[Layer], *, images: int, draws: int) -> LayerTotals:
    """Of at least 2 draws for each of a batch's images, all images of the first, then of the next; waits for the device."""
    rates, means, products = [], [], []
    for layer in layers:
        m = layer.posterior.mean.double().reshape(draws, images, -1 if images else 0)
        total = m.sum(0)
        product = (total.square() - m.square().sum(0)) / (draws * (draws - 1))  # the mean over pairs of draws
        rates.append(_to_grid(layer.rate().view(draws, images).mean(0)).sum().item())
        means.append(_to_grid(total / draws, unit=_CODE).sum(0).cpu().numpy())
        products.append(_to_grid(product, unit=_CODE).sum(0).cpu().numpy())
    return LayerTotals(images=images, rate_nats=tuple(rates), means=tuple(means), products=tuple(products))


def _to_grid(values: Float[Tensor, " *shape"], *, unit: float = _GRID) -> Float[Tensor, " *shape"]:
    return (values.double() / unit).round() * unit
