"""One step of a job's training on one batch, for benchmarks that drive the step themselves, in one process."""

import torch

from vaejob.config import JobConfig
from vaejob.data.batches import Batch
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.step import StepTerms, train_step


@own_arithmetic()
def take_step(
    job: JobConfig,
    scorer: NegativeELBO,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    images: torch.Tensor | None = None,
) -> StepTerms:
    """With the learning rate of the configuration, and beta 1. images: in the place of the batch's own."""
    return train_step(
        scorer,
        optimizer,
        torch.from_numpy(batch.images) if images is None else images,
        batch.ids,
        job=job,
        pixels=scorer.pixels,
        epoch=batch.place.epoch,
        beta=1.0,
        learning_rate=job.optimizer.learning_rate,
        weight=1 / batch.place.images,
    )
