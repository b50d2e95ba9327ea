"""The forward and the backward pass of a step, through the model itself or through compiled graphs of it."""

import copy
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vaejob.config import JobConfig, ObjectiveConfig
from vaejob.errors import ConfigError
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


def as_trained(scorer: NegativeELBO, job: JobConfig, *, world_size: int) -> "nn.Module | CompiledPasses":
    """What the step calls for the model's passes, or what DDP is to wrap: compiled if the job asks for it."""
    if not job.training.compile:
        return scorer
    require_compiler("training.compile is true", otherwise="set training.compile=false")
    if world_size == 1 and job.objective.gradient == "standard" and not scorer.vae.blocks:
        return CompiledPasses(scorer, job)
    return CompiledScorer(scorer, sizes=usual_sizes(job, world_size=world_size))


def require_compiler(asked: str, *, otherwise: str) -> None:
    """Raises ConfigError, which says what was asked for and what to do otherwise, where torch.compile finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # loads the compiler, which takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            f"{asked}, and no C++ compiler is on PATH of {platform.node()}; install g++ there, or {otherwise}"
        ) from None


class CompiledScorer(nn.Module):
    """A scorer, to be trained: batches of the usual sizes go through compiled graphs, and others are not worth more of them.

    The noise of codes is drawn before a graph is called.
    """

    def __init__(self, scorer: NegativeELBO, *, sizes: Collection[int]) -> None:
        super().__init__()
        self.scorer, self._sizes = scorer, sizes
        self._graphs = blocks_compiled(scorer) if scorer.vae.blocks else torch.compile(scorer, dynamic=False)
        self._met = set[int]()

    def forward(
        self,
        levels: Tensor,
        keys: Int64[Tensor, " B"],
        config: ObjectiveConfig,
        own: Int64[Tensor, " B"] | None,
        drawn: None,
    ) -> BoundTerms:
        images = len(levels)
        usual = images in self._sizes
        scorer = self._graphs if usual else self.scorer
        with compiling() if usual and images not in self._met else nullcontext():
            terms: BoundTerms = scorer(levels, keys, config, own, draws(self.scorer.vae, keys, config, own))
        self._met.add(images)
        return terms


def blocks_compiled(scorer: NegativeELBO) -> NegativeELBO:
    """The scorer with its very weights, its model compiled block by block; blocks of one shape share a graph.

    What follows from all codes, likelihood and rates, is a graph of its own. So compiling hardly takes longer for a deep model
    than for a shallow one, and DDP may sum a block's gradients while those of the next are computed.
    """
    twin = copy.deepcopy(scorer, {id(tensor): tensor for tensor in (*scorer.parameters(), *scorer.buffers())})
    for block in twin.vae.blocks:
        block.compile(dynamic=False)
    twin.terms = torch.compile(twin.terms, dynamic=False)  # type: ignore[method-assign]
    return twin


@contextmanager
def compiling(**settings: Any) -> Iterator[None]:
    """While a graph is made: torch would stop compiling one function at its eighth shape, in whatever job, and go on without."""
    import torch._dynamo.config as tracing  # loads the compiler, which takes seconds

    most = 1 << 16
    with tracing.patch(recompile_limit=most, accumulated_recompile_limit=most, **settings):
        yield


class CompiledPasses:
    """Both passes of a single process in one compiled graph, for models that are not made of blocks.

    Other sizes of batches, and noise, as with CompiledScorer.
    """

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
            with compiling(trace_autograd_ops=True):
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
