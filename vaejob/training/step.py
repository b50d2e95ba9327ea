"""One optimisation step: the gradient of the mean objective of the global batch, whatever each rank holds of it."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vaejob.config import JobConfig, LikelihoodConfig, OptimizerConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, objective
from vaejob.likelihood.pixels import ObservationModel, make_pixels
from vaejob.model import build_model
from vaejob.model.noise import Noise, image_noise

EVALUATION_SEED = 0
"""Held-out and static binarisation belong to the data: the same for runs of any seed, so that they compare."""


class StepTerms(NamedTuple):
    """What one step adds to the rank's totals; on the device."""

    bound: BoundTerms
    objective_nats: Float[Tensor, ""]
    """Sum over the rank's images."""


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
    model: nn.Module,
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
) -> StepTerms:
    """Moves the weights once. `weight` is world size / images of the global batch: DDP divides by the world size."""
    noise = training_noise(ids, seed=job.run.seed, epoch=epoch, device=images.device)
    levels = draw_levels(images, ids, pixels=pixels, config=job.likelihood, noise=noise)
    terms: BoundTerms = model(levels, noise.keys, job.objective)
    objective_nats = objective(terms, beta=beta, free_bits_nats=job.objective.free_bits_nats).sum()
    (objective_nats * weight).backward()  # type: ignore[no-untyped-call]
    if job.optimizer.clip > 0:
        nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepTerms(terms.detach(), objective_nats.detach())


def make_scorer(job: JobConfig, *, shape: tuple[int, int, int]) -> NegativeELBO:
    """The model of a job with its initial weights. Raises ConfigError for sizes that do not fit the images."""
    pixels = make_pixels(job.likelihood)
    vae = build_model(job.model, shape=shape, output_planes=pixels.parameters(shape[0]), seed=job.run.seed)
    return NegativeELBO(vae, pixels)


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    match config.name:
        case "adam":
            return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)
        case "adamax":
            return torch.optim.Adamax(model.parameters(), lr=rate, weight_decay=decay, foreach=True)
