"""Sums over images, exact and therefore the same however the images are split over workers; one division at the end.

Each image's nats are rounded to a multiple of 2^-16, and their square is carried as a multiple of 2^12 plus the
remainder, rounded to a multiple of 2^-16. Sums of such multiples are exact in float64 below 2^37 nats (10^7 images of
10^4 nats) and for any square up to 2^26 images, so addition is associative and no order changes a digit.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vaejob.likelihood.bounds import BoundTerms
from vaejob.likelihood.units import bits_per_dim

_GRID = 2.0**-16
_COARSE = 2.0**12
Quantity = Literal["distortion", "rate", "negative_bound"]
_QUANTITIES: tuple[Quantity, ...] = ("distortion", "rate", "negative_bound")


@dataclass(frozen=True, kw_only=True)
class LikelihoodTotals:
    """What a worker knows of its images; totals of several workers add up to those of all."""

    images: int = 0
    dims: int = 0
    """Pixels times channels, summed over the images."""
    non_finite: int = 0
    """Images of which a term was not finite; they are missing from the sums below, so nothing can be divided."""
    distortion_nats: float = 0.0
    """Sum of -log p(x | z)."""
    rate_nats: float = 0.0
    """Sum of KL(q(z | x) || p(z)) over all layers."""
    negative_bound_nats: float = 0.0
    """Sum of the negative ELBO, or of the negative importance-weighted bound."""
    distortion_squares: float = 0.0
    """Sums of squares: the multiples of 2^12 nats^2 here, the remainders below."""
    rate_squares: float = 0.0
    negative_bound_squares: float = 0.0
    distortion_squares_rest: float = 0.0
    rate_squares_rest: float = 0.0
    negative_bound_squares_rest: float = 0.0

    def __add__(self, other: "LikelihoodTotals") -> "LikelihoodTotals":
        return LikelihoodTotals(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def mean(self, name: Quantity) -> float:
        """Nats per image."""
        self._check_divisible()
        total: float = getattr(self, f"{name}_nats")
        return total / self.images

    def standard_error(self, name: Quantity) -> float:
        """Of the mean, in nats, from the spread over images."""
        mean = self.mean(name)
        squares: float = getattr(self, f"{name}_squares") + getattr(self, f"{name}_squares_rest")
        return math.sqrt(max(squares / self.images - mean**2, 0.0) / self.images)

    @property
    def bits_per_dim(self) -> float:
        """Of the bound."""
        self._check_divisible()
        return bits_per_dim(self.negative_bound_nats, self.dims)

    @property
    def bits_per_dim_standard_error(self) -> float:
        """Exact where all images have the same size."""
        return bits_per_dim(self.standard_error("negative_bound"), self.dims / self.images)

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers that JSON gives back exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> "LikelihoodTotals":
        """Out of what to_dict gave, or of a report's row that holds other columns as well."""
        return cls(**{f.name: numbers[f.name] for f in fields(cls)})

    def _check_divisible(self) -> None:
        if self.non_finite:
            raise ArithmeticError(f"{self.non_finite} of {self.images} images have a likelihood that is not finite")
        if not self.images:
            raise ZeroDivisionError("no image was counted, so there is no mean")


class RunningTotals:
    """Totals that stay on the device: adding never waits for it; images and dims are counted from shapes."""

    def __init__(self, *, dims_per_image: int, device: torch.device | str) -> None:
        self._dims_per_image = dims_per_image
        self._images = 0
        # Rows: nats, coarse squares, their remainders, and in each column of the last row the images left out.
        self._sums = torch.zeros(4, len(_QUANTITIES), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, terms: BoundTerms, *, negative_bound: Float[Tensor, " B"] | None = None) -> None:
        """Without another bound it is the negative ELBO, to which its two halves then add up exactly."""
        distortion, rate = _to_grid(terms.distortion), _to_grid(terms.rate)
        bound = distortion + rate if negative_bound is None else _to_grid(negative_bound)
        nats = torch.stack((distortion, rate, bound))
        finite = nats.isfinite().all(0)
        nats = torch.where(finite, nats, 0.0)
        squares = nats.square()
        coarse = (squares / _COARSE).round() * _COARSE
        left_out = (~finite).double().expand_as(nats)
        self._sums += torch.stack((nats, coarse, _to_grid(squares - coarse), left_out)).sum(2)
        self._images += nats.shape[1]

    def to_host(self) -> LikelihoodTotals:
        """Waits for the device."""
        nats, squares, rests, left_out = self._sums.tolist()
        numbers: dict[str, Any] = {"non_finite": int(left_out[0])}
        for name, *sums in zip(_QUANTITIES, nats, squares, rests, strict=True):
            numbers |= zip((f"{name}_nats", f"{name}_squares", f"{name}_squares_rest"), sums, strict=True)
        return LikelihoodTotals(images=self._images, dims=self._images * self._dims_per_image, **numbers)

    def clear(self) -> None:
        self._images = 0
        self._sums.zero_()


def _to_grid(nats: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    return (nats.double() / _GRID).round() * _GRID
