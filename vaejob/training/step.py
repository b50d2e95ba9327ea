"""One optimisation step: the gradient of the mean objective of the global batch, whatever each rank holds of it."""

import platform
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from vaejob.config import JobConfig, LikelihoodConfig, ObjectiveConfig, OptimizerConfig
from vaejob.errors import ConfigError
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, draws, objective
from vaejob.likelihood.pixels import ObservationModel, make_pixels
from vaejob.model import build_model
from vaejob.model.noise import Noise, image_noise
from vaejob.training.stability import GradientGuard

EVALUATION_SEED = 0
"""Held-out and static binarisation belong to the data: the same for runs of any seed, so that they compare."""


class StepTerms(NamedTuple):
    """What one step adds to the rank's totals; on the device."""

    bound: BoundTerms
    objective_nats: Float[Tensor, ""]
    """Sum over the rank's images."""
    skipped: Float[Tensor, ""]
    """1 if the weights were left as they are, else 0."""


def training_noise(ids: np.ndarray, *, seed: int, epoch: int, device: torch.device) -> Noise:
    return image_noise(ids, seed=seed, purpose="train", epoch=epoch, device=device)


def evaluation_noise(ids: np.ndarray, *, device: torch.device) -> Noise:
    return image_noise(ids, seed=EVALUATION_SEED, purpose="evaluate", device=device)


def draw_levels(
    images: UInt8[Tensor, "B C H W"],
    ids: np.ndarray,
    *,
    pixels: ObservationModel,
    config: LikelihoodConfig,
    noise: Noise,
) -> Tensor:
    """The images as integer levels; statically binarised ones are the same in every epoch and every run."""
    if config.binarize == "static":
        noise = image_noise(ids, seed=EVALUATION_SEED, purpose="static", device=images.device)
    return pixels.to_levels(images, noise)


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


def train_step(
    model: "nn.Module | CompiledPasses",
    optimizer: torch.optim.Optimizer,
    images: UInt8[Tensor, "B C H W"],
    ids: np.ndarray,
    *,
    job: JobConfig,
    pixels: ObservationModel,
    epoch: int,
    beta: float,
    learning_rate: float,
    weight: float,
    guard: GradientGuard | None = None,
) -> StepTerms:
    """Moves the weights once, or not at all. `weight` is world size / images of the global batch: DDP divides by the world size.

    Without a guard that knows the steps before, the step is skipped only if its gradient is not finite.
    """
    guard = guard or GradientGuard(job.optimizer, device=images.device)
    noise = training_noise(ids, seed=job.run.seed, epoch=epoch, device=images.device)
    levels = draw_levels(images, ids, pixels=pixels, config=job.likelihood, noise=noise)
    own = torch.tensor(ids, device=images.device) if job.objective.own_codes else None
    if isinstance(model, CompiledPasses):
        terms, objective_nats = model(levels, noise.keys, own, beta=beta, weight=weight)
    else:
        terms, objective_nats = forward(model, levels, noise.keys, own, job=job, beta=beta)
        (objective_nats * weight).backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    skipped = guard.step(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return StepTerms(terms.detach(), objective_nats.detach(), skipped)


class CompiledScorer(nn.Module):
    """A scorer for DDP: full batches go through a compiled graph, for which the codes' noise is drawn beforehand.

    A batch of another size, such as the last of an epoch, is not worth compiling anew for.
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
    """Forward and backward pass of a single process in one compiled graph; other sizes of batches as CompiledScorer does."""

    def __init__(self, scorer: NegativeELBO, job: JobConfig) -> None:
        self._scorer, self._job = scorer, job
        self._parameters = tuple(scorer.parameters())
        self._graph = torch.compile(self._passes, dynamic=False)
        self._compiled = False

    def __call__(
        self, levels: Tensor, keys: Int64[Tensor, " B"], own: Int64[Tensor, " B"] | None, *, beta: float, weight: float
    ) -> tuple[BoundTerms, Float[Tensor, ""]]:
        """As `forward`; the parameters then hold the gradient of weight times the objective."""
        full = len(levels) == self._job.data.global_batch
        # As tensors: a graph would be made for each value of a number.
        beta_there, weight_there = (torch.full((), value, device=levels.device) for value in (beta, weight))
        drawn = draws(self._scorer.vae, keys, self._job.objective, own)
        arguments = levels, keys, own, drawn, beta_there, weight_there
        if full and not self._compiled:
            import torch._dynamo.config as tracing  # loads the compiler, which takes seconds

            with tracing.patch(trace_autograd_ops=True):
                self._graph(*arguments)
            self._compiled = True
        terms, objective_nats, gradients = (self._graph if full else self._passes)(*arguments)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            # Fused optimisers go through the memory of both in one order.
            alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
        return terms, objective_nats

    def _passes(
        self,
        levels: Tensor,
        keys: Int64[Tensor, " B"],
        own: Int64[Tensor, " B"] | None,
        drawn: Mapping[int, Tensor],
        beta: Float[Tensor, ""],
        weight: Float[Tensor, ""],
    ) -> tuple[BoundTerms, Float[Tensor, ""], tuple[Tensor, ...]]:
        terms, objective_nats = forward(self._scorer, levels, keys, own, job=self._job, beta=beta, drawn=drawn)
        gradients = torch.autograd.grad(objective_nats * weight, self._parameters)
        return terms.detach(), objective_nats.detach(), gradients


@torch.no_grad()
def move_average(averaged: nn.Module, model: nn.Module, *, share: float, skipped: Float[Tensor, ""]) -> None:
    """averaged += share * (model - averaged), unless the step was skipped; without waiting for the device."""
    average, weights = tuple(averaged.parameters()), tuple(model.parameters())
    if skipped.device.type == "cpu":
        torch._foreach_lerp_(average, weights, 0.0 if skipped else share)
        return
    change = torch._foreach_sub(weights, average)
    torch._foreach_mul_(change, share * (1 - skipped))
    torch._foreach_add_(average, change)


def make_scorer(job: JobConfig, *, shape: tuple[int, int, int], images: int = 0) -> NegativeELBO:
    """The model of a job with its initial weights; images of the training data are counted for a table of their codes.

    Raises ConfigError for sizes that do not fit the images.
    """
    pixels = make_pixels(job.likelihood)
    table = images if job.objective.pairing == "latent-table" else 0
    assert table or job.objective.pairing != "latent-table", "a table of codes needs the number of images"
    planes = pixels.parameters(shape[0])
    vae = build_model(job.model, shape=shape, output_planes=planes, seed=job.run.seed, images=table)
    return NegativeELBO(vae, pixels)


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    weights, betas = model.parameters(), (config.beta1, config.beta2)
    rate, epsilon, decay = config.learning_rate, config.epsilon, config.weight_decay
    match config.name:
        case "adam":
            return torch.optim.Adam(weights, lr=rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(weights, lr=rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)
        case "adamax":
            return torch.optim.Adamax(weights, lr=rate, betas=betas, eps=epsilon, weight_decay=decay, foreach=True)


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
