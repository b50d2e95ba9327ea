"""Which steps are taken, by the norm of the gradient, and what becomes of a job whose gradient stays not finite.

After the all-reduce every rank holds the gradient of the global batch in the same bits. A decision that is a function of it
and of the decisions before is therefore the same on every rank, and nothing has to be communicated.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaejob.config import OptimizerConfig
from vaejob.errors import ConfigError
from vaejob.training.worker import Report

RING_STEPS = 64
"""Norms of the steps taken last, against whose median the next one is held once there are so many."""
LARGE_IN_A_ROW = 8
"""Steps skipped one after another for a norm that is large but finite; the next one is taken, so that no model freezes."""
NON_FINITE_IN_A_ROW = 16
"""Steps skipped one after another for a norm that is not finite; then the job goes back."""
MOST_HALVINGS = 3
"""Times that a job goes back, each time at half the learning rate; then it ends."""


class StepCounts(NamedTuple):
    """What became of the steps since the last report; the same on every rank."""

    steps: int
    skipped: int
    non_finite: int
    """Of the skipped, those whose gradient was not finite."""
    norms: float
    """Sum of the gradient's norm, before clipping, over the steps taken."""
    non_finite_in_a_row: int
    """Up to now, from before the last report if need be."""


class Diverged(Exception):  # noqa: N818 - a state of the job
    """The gradient stays not finite: the weights have come to where training cannot go on."""

    def __init__(self, report: Report) -> None:
        super().__init__(
            f"the gradients of {report.non_finite_in_a_row} steps in a row were not finite at {report.images_seen} images seen"
        )
        self.report = report


class GradientGuard:
    """Takes each step, clipped, or skips it: then neither weights nor moments nor the optimiser's counters change."""

    def __init__(
        self, config: OptimizerConfig, *, device: torch.device | str = "cpu", on_host: bool | None = None
    ) -> None:
        self._clip = config.clip or float("inf")
        self._factor = config.skip_factor or float("inf")
        # A CPU does not run ahead, so nothing waits where its numbers are looked at. torch's fused optimisers look on the
        # device; Adamax has no such step, and costs a GPU a wait at each.
        self._on_host = config.name == "adamax" or torch.device(device).type == "cpu" if on_host is None else on_host
        self.halvings = 0
        """Times that the job went back; each halves the learning rate for good."""
        self._norms = torch.full((RING_STEPS,), float("nan"), device=device)  # the oldest first
        self._large_in_a_row, self._non_finite_in_a_row = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        self._steps = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # skipped, non-finite, norms

    @property
    def rate_factor(self) -> float:
        return 0.5**self.halvings

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> Float[Tensor, ""]:
        """Moves the weights by the gradients that they hold; 1 if the step was skipped, else 0, on the device."""
        held = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        gradients = [gradient for gradient in held if gradient is not None]
        skipped, divisor = self._judge(nn.utils.get_total_norm(gradients).float())
        if not self._on_host:
            # What GradScaler tells a fused optimiser: it leaves everything as it is, or divides the gradient first.
            optimizer.found_inf, optimizer.grad_scale = skipped, divisor  # type: ignore[attr-defined]
            optimizer.step()
        elif not skipped:
            if divisor != 1:
                torch._foreach_div_(gradients, divisor)
            optimizer.step()
        return skipped

    def _judge(self, norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Whether the step is skipped, as 1 or 0, and by what its gradient is divided; without waiting for the device."""
        largest = self._factor * self._norms.median()  # nan, which nothing exceeds, until the ring is full
        finite = norm.isfinite()
        large = finite & (norm > largest)
        escapes = large & (self._large_in_a_row >= LARGE_IN_A_ROW)
        skipped = ~finite | (large & ~escapes)
        bound = torch.where(escapes, largest.clamp(max=self._clip), self._clip)
        pushed = torch.where(skipped, self._norms, torch.cat((self._norms[1:], norm[None])))
        self._norms = torch.where(escapes, torch.nan, pushed)
        self._large_in_a_row = torch.where(finite, (self._large_in_a_row + 1) * skipped, self._large_in_a_row)
        self._non_finite_in_a_row = (self._non_finite_in_a_row + 1) * ~finite
        self._steps += 1
        self._sums += torch.stack((skipped, ~finite, torch.where(skipped, 0.0, norm)))
        return skipped.float(), (norm / bound).clamp(min=1.0)

    def counts(self) -> StepCounts:
        """Since the last restart; waits for the device."""
        skipped, non_finite, norms = self._sums.tolist()
        return StepCounts(self._steps, int(skipped), int(non_finite), norms, int(self._non_finite_in_a_row))

    def restart(self) -> None:
        """Behind a report; what later decisions depend on stays."""
        self._steps = 0
        self._sums.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What later decisions depend on."""
        counts = (
            self._large_in_a_row,
            self._non_finite_in_a_row,
            torch.tensor(self.halvings, device=self._norms.device),
        )
        return {"norms": self._norms, "counts": torch.stack(counts)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what tensors() gave; states older than the guard have none of it."""
        if tensors:
            self._norms = tensors["norms"].to(self._norms.device, copy=True)
            counts = tensors["counts"].to(self._norms.device, copy=True)
            self._large_in_a_row, self._non_finite_in_a_row, self.halvings = counts[0], counts[1], int(counts[2])


def diverged(report: Report, *, last: bool) -> bool:
    """Whether training cannot go on. last: nothing follows, so a shorter row is enough, if all steps of the report are in it."""
    row = report.non_finite_in_a_row
    return row >= NON_FINITE_IN_A_ROW or (last and row >= report.steps > 0)


def refuse_to_go_on(report: Report) -> NoReturn:
    """Raises Diverged, for the job to go back; ConfigError where it has gone back as often as it may."""
    diverged = Diverged(report)
    if report.halvings < MOST_HALVINGS:
        raise diverged
    raise ConfigError(
        f"{diverged}, after the learning rate was halved {report.halvings} times; start a new run with a lower "
        "optimizer.learning_rate, or with optimizer.warmup_images or optimizer.clip set"
    )


@torch.no_grad()
def replica_checksum(weights: Iterable[Tensor]) -> int:
    """Of the weights' bits, exact and the same in any order of summation; waits for the device.

    Each tensor's words are added up as integers, and the sums, each times an odd number of its own, modulo 2^64.
    """
    words = [weight.detach().reshape(-1).view(torch.int32).sum() for weight in weights]
    odd = torch.arange(1, 2 * len(words), 2, device=words[0].device)
    return int((torch.stack(words) * odd).sum()) % 2**64
