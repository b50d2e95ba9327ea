"""What is known of images as sums over them, in plain numbers: what reads a run's rows and records needs no torch."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vaejob.likelihood.units import bits_per_dim

Quantity = Literal["distortion", "rate", "negative_bound"]
QUANTITIES: tuple[Quantity, ...] = ("distortion", "rate", "negative_bound")
OF_WEIGHTS = ("weighed_images", "effective_samples", "weight_variance", "largest_inverse_ess")


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
    weighed_images: int = 0
    """Images with an IWAE bound; the four below are of their importance weights w, K of them for each image."""
    effective_samples: float = 0.0
    """Sum of ESS = (sum w)^2 / sum w^2, in samples."""
    weight_variance: float = 0.0
    """Sum of 1 / ESS - 1 / K in nats^2: by the delta method the variance of an image's bound, and twice what it lacks."""
    largest_inverse_ess: float = 0.0
    """Of any image: no sum, the larger of two is that of both."""

    def __add__(self, other: "LikelihoodTotals") -> "LikelihoodTotals":
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        added["largest_inverse_ess"] = max(self.largest_inverse_ess, other.largest_inverse_ess)
        return LikelihoodTotals(**added)

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

    def weights(self) -> dict[str, float]:
        """What the importance weights tell of the bound; empty where none were drawn, as for an ELBO."""
        if not self.weighed_images:
            return {}
        self._check_divisible()
        lacking = self.weight_variance / self.weighed_images
        return {
            "effective_samples": self.effective_samples / self.weighed_images,
            "least_effective_samples": 1 / self.largest_inverse_ess,
            # In nats per image. E[log mean w] - log p = -Var(mean w) / 2 E[w]^2 + ..., too small where ESS is small.
            "bound_bias_nats_estimate": -lacking / 2,
            # Of the mean over these images, from the codes drawn; the other standard errors are from the choice of images.
            "negative_bound_nats_sampling_error": math.sqrt(lacking / self.weighed_images),
        }

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers that JSON gives back exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> "LikelihoodTotals":
        """Out of what to_dict gave, or of a report's row that holds other columns as well, or is older than the weights."""
        unknown = {name for name in OF_WEIGHTS if numbers.get(name) is None}
        return cls(**{f.name: numbers[f.name] for f in fields(cls) if f.name not in unknown})

    def _check_divisible(self) -> None:
        if self.non_finite:
            raise ArithmeticError(f"{self.non_finite} of {self.images} images have a likelihood that is not finite")
        if not self.images:
            raise ZeroDivisionError("no image was counted, so there is no mean")
