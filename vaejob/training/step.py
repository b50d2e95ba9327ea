"""One optimisation step: the gradient of the mean objective of the global batch, whatever each rank holds of it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vaejob.config import JobConfig, LikelihoodConfig, OptimizerConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO
from vaejob.likelihood.pixels import ObservationModel, make_pixels
from vaejob.model import build_model
from vaejob.model.noise import Noise, image_noise
from vaejob.training.passes import CompiledPasses, Passed, both_passes
from vaejob.training.profile import stage
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


def train_step(
    model: nn.Module | CompiledPasses,
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
    with stage("noise"):
        noise = training_noise(ids, seed=job.run.seed, epoch=epoch, device=images.device)
        levels = draw_levels(images, ids, pixels=pixels, config=job.likelihood, noise=noise)
    own = torch.tensor(ids, device=images.device) if job.objective.own_codes else None
    passed = list[Passed]()
    for piece in (pieces := in_pieces(len(ids), job.training.micro_batch)):
        with summed_later(model) if piece is not pieces[-1] else nullcontext():
            keys, own_of_piece = noise.keys[piece], None if own is None else own[piece]
            passed.append(both_passes(model, levels[piece], keys, own_of_piece, job=job, beta=beta, weight=weight))
    terms, objective_nats, norm = joined(passed)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with stage("guard"):
        skipped = guard.step(optimizer, norm=norm)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    return StepTerms(terms, objective_nats, skipped)


def in_pieces(images: int, most: int) -> list[slice]:
    """Of so many images at most, or all together for 0; one of no images where there are none."""
    return [slice(start, start + most) for start in range(0, images, most)] if most and images else [slice(images)]


def summed_later(model: nn.Module | CompiledPasses) -> AbstractContextManager[None]:
    """While it is open, gradients add up on the rank alone; those of all ranks are summed in the pass after it."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def joined(passed: Sequence[Passed]) -> Passed:
    if len(passed) == 1:
        return passed[0]
    columns = zip(*(one.terms for one in passed), strict=True)
    terms = BoundTerms(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
    return Passed(terms, torch.stack([one.objective_nats for one in passed]).sum())


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
