"""What changes with progress, as pure functions of images seen."""

import math
from typing import NamedTuple

from vaejob.config import JobConfig, ObjectiveConfig, OptimizerConfig


class Due(NamedTuple):
    """What is to be done after a batch."""

    report: bool
    evaluate: bool
    save: bool


def due(job: JobConfig, *, before: int, after: int) -> Due:
    """What falls on the images (before, after], the same for any number of workers.

    A held-out pass and a checkpoint end a report, so that the history of a resumed run is that of an uninterrupted one;
    all three fall on the last image.
    """
    done = after >= job.training.images
    evaluate = done or crosses(job.training.evaluate_every_images, before=before, after=after)
    save = done or crosses(job.checkpoint.every_images, before=before, after=after)
    report = save or evaluate or crosses(job.training.report_every_images, before=before, after=after)
    return Due(report, evaluate and job.data.test is not None, save)


def learning_rate(config: OptimizerConfig, *, images_seen: int, images: int) -> float:
    """Linear warm-up, then constant or a half cosine that ends at zero when all images are seen."""
    rate = config.learning_rate
    if images_seen < config.warmup_images:
        return rate * (images_seen + 1) / config.warmup_images
    if config.schedule == "cosine":
        done = (images_seen - config.warmup_images) / max(1, images - config.warmup_images)
        rate *= 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return rate


def beta(config: ObjectiveConfig, *, images_seen: int) -> float:
    """Weight of the rate in the objective."""
    return 1.0 if images_seen >= config.kl_warmup_images else images_seen / config.kl_warmup_images


def crosses(every_images: int, *, before: int, after: int) -> bool:
    """Whether a multiple of every_images lies in (before, after]; never for 0."""
    return every_images > 0 and before // every_images < after // every_images
