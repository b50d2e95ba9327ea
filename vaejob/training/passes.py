"""The forward and the backward pass of a step, through the model itself or through compiled graphs of it."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vaejob.config import JobConfig, ObjectiveConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, draws, objective
from vaejob.training.profile import stage


class Passed(NamedTuple):
    """What both passes of a batch, or of a piece of it, have found; on the device."""

    terms: BoundTerms
    objective_nats: Float[Tensor, ""]
    """Sum over the images."""
    norm: Float[Tensor, ""] | None = None
    """Of the gradient that they added, where that came with it."""


def forward(
    model: nn.Module,
    levels: Tensor,
    keys: Int64[Tensor, " B"],
    own: Int64[Tensor, " B"] | None,
    *,
    job: JobConfig,
    beta: float | Float[Tensor, ""],
    drawn: Mapping[int, Tensor] | None = None,
) -> tuple[BoundTerms, Float[Tensor, ""]]:
    """The terms of each image, and the sum of their objective."""
    with torch.autocast(levels.device.type, torch.bfloat16, enabled=job.training.precision == "bf16"):
        terms: BoundTerms = model(levels, keys, job.objective, own, drawn)
    return terms, objective(terms, beta=beta, free_bits_nats=job.objective.free_bits_nats).sum()


def both_passes(
    model: "nn.Module | CompiledPasses",
    levels: Tensor,
    keys: Int64[Tensor, " B"],
    own: Int64[Tensor, " B"] | None,
    *,
    job: JobConfig,
    beta: float,
    weight: float,
) -> Passed:
    """Adds the gradient of weight times the objective to what the parameters hold."""
    if isinstance(model, CompiledPasses):
        with stage("forward"):
            return model(levels, keys, own, beta=beta, weight=weight)
    with stage("forward"):
        terms, objective_nats = forward(model, levels, keys, own, job=job, beta=beta)
    with stage("backward"):
        (objective_nats * weight).backward()  # type: ignore[no-untyped-call]
    return Passed(terms.detach(), objective_nats.detach())


def usual_sizes(job: JobConfig, *, world_size: int) -> set[int]:
    """Images that a rank takes through the model at once, but for what is left over at the end of an epoch or a batch."""
    least, rest = divmod(job.data.global_batch, world_size)
    return {min(images, job.training.micro_batch or images) for images in (least, least + bool(rest))}


class CompiledScorer(nn.Module):
    """A scorer for DDP: batches of the usual sizes go through a compiled graph, and others are not worth another one.

    The noise of codes is drawn before the graph is called.
    """

    def __init__(self, scorer: NegativeELBO, *, sizes: Collection[int]) -> None:
        super().__init__()
        self.scorer, self._sizes = scorer, sizes
        self._graph = torch.compile(scorer, dynamic=False)

    def forward(
        self,
        levels: Tensor,
        keys: Int64[Tensor, " B"],
        config: ObjectiveConfig,
        own: Int64[Tensor, " B"] | None,
        drawn: None,
    ) -> BoundTerms:
        graph = self._graph if len(levels) in self._sizes else self.scorer
        terms: BoundTerms = graph(levels, keys, config, own, draws(self.scorer.vae, keys, config, own))
        return terms


class CompiledPasses:
    """Both passes of a single process in one compiled graph; other sizes of batches, and noise, as with CompiledScorer."""

    def __init__(self, scorer: NegativeELBO, job: JobConfig) -> None:
        self._scorer, self._job = scorer, job
        self._sizes = usual_sizes(job, world_size=1)
        self._parameters = tuple(scorer.parameters())
        self._graph = torch.compile(self._passes, dynamic=False)
        self._compiled = False

    def __call__(
        self, levels: Tensor, keys: Int64[Tensor, " B"], own: Int64[Tensor, " B"] | None, *, beta: float, weight: float
    ) -> Passed:
        """As `both_passes`."""
        usual = len(levels) in self._sizes
        # As tensors: a graph would be made for each value of a number.
        beta_there, weight_there = (torch.full((), value, device=levels.device) for value in (beta, weight))
        drawn = draws(self._scorer.vae, keys, self._job.objective, own)
        arguments = levels, keys, own, drawn, beta_there, weight_there
        if usual and not self._compiled:
            import torch._dynamo.config as tracing  # loads the compiler, which takes seconds

            with tracing.patch(trace_autograd_ops=True):
                self._graph(*arguments)
            self._compiled = True
        passed, gradients = (self._graph if usual else self._passes)(*arguments)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            elif gradient.is_contiguous() and parameter.is_contiguous():
                parameter.grad = gradient
            else:  # fused optimisers go through the memory of both in one order
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return passed

    def _passes(
        self,
        levels: Tensor,
        keys: Int64[Tensor, " B"],
        own: Int64[Tensor, " B"] | None,
        drawn: Mapping[int, Tensor],
        beta: Float[Tensor, ""],
        weight: Float[Tensor, ""],
    ) -> tuple[Passed, tuple[Tensor, ...]]:
        terms, objective_nats = forward(self._scorer, levels, keys, own, job=self._job, beta=beta, drawn=drawn)
        gradients = torch.autograd.grad(objective_nats * weight, self._parameters)
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        return Passed(terms.detach(), objective_nats.detach(), norm), gradients
