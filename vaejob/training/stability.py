"""Which steps are taken, by the norm of the gradient, and what becomes of a job whose gradient stays not finite.

After the all-reduce every rank holds the gradient of the global batch in the same bits. A decision that is a function of it
and of the decisions before is therefore the same on every rank, and nothing has to be communicated.
"""

import ctypes
import math
import statistics
from collections import deque
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
        clip, factor = config.clip or math.inf, config.skip_factor or math.inf
        # A CPU does not run ahead, so nothing waits where its numbers are looked at. torch's fused optimisers look on the
        # device; Adamax has no such step, and costs a GPU a wait at each.
        self._on_host = config.name == "adamax" or torch.device(device).type == "cpu" if on_host is None else on_host
        self._judge = HostJudge(clip, factor) if self._on_host else DeviceJudge(clip, factor, device=device)
        self.halvings = 0
        """Times that the job went back; each halves the learning rate for good."""
        self._device = device
        self._steps = 0

    @property
    def rate_factor(self) -> float:
        return 0.5**self.halvings

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, *, norm: Float[Tensor, ""] | None = None) -> Float[Tensor, ""]:
        """Moves the weights by the gradients that they hold; 1 if the step was skipped, else 0, on the device.

        norm: of all gradients together, if it is known.
        """
        held = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        gradients = [gradient for gradient in held if gradient is not None]
        self._steps += 1
        norm = nn.utils.get_total_norm(gradients).float() if norm is None else norm
        if isinstance(self._judge, DeviceJudge):
            # What GradScaler tells a fused optimiser: it leaves everything as it is, or divides the gradient first.
            skipped, divisor = self._judge(norm)
            optimizer.found_inf, optimizer.grad_scale = skipped, divisor  # type: ignore[attr-defined]
            optimizer.step()
            return skipped
        divide_by = self._judge(norm.item())
        if divide_by is None:
            return torch.ones((), device=self._device)
        if divide_by != 1:
            torch._foreach_div_(gradients, divide_by)
        optimizer.step()
        return torch.zeros((), device=self._device)

    def counts(self) -> StepCounts:
        """Since the last restart; waits for the device."""
        return StepCounts(self._steps, *self._judge.counts())

    def restart(self) -> None:
        """Behind a report; what later decisions depend on stays."""
        self._steps = 0
        self._judge.restart()

    def tensors(self) -> dict[str, Tensor]:
        """What later decisions depend on."""
        norms, large, non_finite = self._judge.state()
        counts = (large, non_finite, torch.tensor(self.halvings, device=norms.device))
        return {"norms": norms, "counts": torch.stack(counts)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what tensors() gave; states older than the guard have none of it."""
        if tensors:
            large, non_finite, halvings = tensors["counts"].to(self._device, copy=True)
            self._judge.load(tensors["norms"].to(self._device, copy=True), large, non_finite)
            self.halvings = int(halvings)


class HostJudge:
    """Whether a step is skipped, and by what its gradient is divided, in plain numbers that are rounded as on a device."""

    def __init__(self, clip: float, factor: float) -> None:
        self._clip, self._factor = _single(clip), _single(factor)
        self._norms = deque[float](maxlen=RING_STEPS)
        self._large_in_a_row = self._non_finite_in_a_row = 0
        self.restart()

    def restart(self) -> None:
        self._skipped = self._non_finite = 0
        self._sum = 0.0

    def __call__(self, norm: float) -> float | None:
        """The divisor; None where the step is skipped."""
        if not math.isfinite(norm):
            self._non_finite_in_a_row += 1
            self._non_finite += 1
            self._skipped += 1
            return None
        self._non_finite_in_a_row = 0
        largest = math.inf
        if len(self._norms) == RING_STEPS:
            largest = _single(self._factor * statistics.median_low(self._norms))
        bound = self._clip
        if norm > largest:
            if self._large_in_a_row < LARGE_IN_A_ROW:
                self._large_in_a_row += 1
                self._skipped += 1
                return None
            self._norms.clear()
            bound = min(largest, self._clip)
        else:
            self._norms.append(norm)
        self._large_in_a_row = 0
        self._sum += norm
        return max(1.0, _single(norm / bound)) if bound else math.inf

    def counts(self) -> tuple[int, int, float, int]:
        """Skipped, of them not finite, the sum of norms; not finite in a row."""
        return self._skipped, self._non_finite, self._sum, self._non_finite_in_a_row

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        missing = [math.nan] * (RING_STEPS - len(self._norms))
        counts = torch.tensor((self._large_in_a_row, self._non_finite_in_a_row))
        return torch.tensor([*missing, *self._norms], dtype=torch.float32), counts[0], counts[1]

    def load(self, norms: Tensor, large: Tensor, non_finite: Tensor) -> None:
        self._norms.clear()
        self._norms.extend(norm for norm in norms.tolist() if not math.isnan(norm))
        self._large_in_a_row, self._non_finite_in_a_row = int(large), int(non_finite)


def _single(value: float) -> float:
    """Rounded to float32, in which devices compare and divide."""
    return ctypes.c_float(value).value


class DeviceJudge:
    """The same on a device, without waiting for it."""

    def __init__(self, clip: float, factor: float, *, device: torch.device | str) -> None:
        self._clip, self._factor = clip, factor
        self._norms = torch.full((RING_STEPS,), math.nan, device=device)  # the oldest first
        self._large_in_a_row, self._non_finite_in_a_row = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # skipped, non-finite, norms

    def restart(self) -> None:
        self._sums.zero_()

    def __call__(self, norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """1 or 0, and the divisor."""
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
        self._sums += torch.stack((skipped, ~finite, torch.where(skipped, 0.0, norm)))
        return skipped.float(), (norm / bound).clamp(min=1.0)

    def counts(self) -> tuple[int, int, float, int]:
        skipped, non_finite, norms = self._sums.tolist()
        return int(skipped), int(non_finite), norms, int(self._non_finite_in_a_row)

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._norms, self._large_in_a_row, self._non_finite_in_a_row

    def load(self, norms: Tensor, large: Tensor, non_finite: Tensor) -> None:
        self._norms, self._large_in_a_row, self._non_finite_in_a_row = norms, large, non_finite


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
