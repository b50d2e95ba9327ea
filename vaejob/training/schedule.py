"""What changes with progress, as pure functions of images seen."""

import math
from typing import NamedTuple

from vaejob.config import JobConfig, ObjectiveConfig, OptimizerConfig

STAGES = 8
STAGED_PARTS = (3**STAGES - 1) // 2


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
    """Linear warm-up, then constant, a half cosine that ends at zero when all images are seen, or in stages."""
    rate = config.learning_rate
    if config.schedule == "staged":
        rate *= 10 ** (-_stage(images_seen, images=images) / (STAGES - 1))
    if images_seen < config.warmup_images:
        return rate * (images_seen + 1) / config.warmup_images
    if config.schedule == "cosine":
        done = (images_seen - config.warmup_images) / max(1, images - config.warmup_images)
        rate *= 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return rate


def _stage(images_seen: int, *, images: int) -> int:
    """Of the IWAE paper's: stage i lasts 3^i parts of all images, of which there are 3280 (Burda et al., 2016)."""
    ends = ((3 ** (i + 1) - 1) // 2 for i in range(STAGES - 1))
    return sum(images_seen * STAGED_PARTS >= end * images for end in ends)


def average_share(config: OptimizerConfig, *, before: int, after: int) -> float:
    """How far the averaged weights move towards the weights after a batch of (before, after] images: 1 - exp(-B / span).

    A batch that lies `span` images back weighs 1 / e of the newest. The span is optimizer.ema, but at first a tenth of the
    images seen, so that the initial weights are forgotten; then it is the same for any size of the global batch.
    """
    return -math.expm1(-(after - before) / min(config.ema, after / 10))


def beta(config: ObjectiveConfig, *, images_seen: int) -> float:
    """Weight of the rate in the objective."""
    return 1.0 if images_seen >= config.kl_warmup_images else images_seen / config.kl_warmup_images


def crosses(every_images: int, *, before: int, after: int) -> bool:
    """Whether a multiple of every_images lies in (before, after]; never for 0."""
    return every_images > 0 and before // every_images < after // every_images
