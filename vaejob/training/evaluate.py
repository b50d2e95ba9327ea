"""The likelihood of held-out images: each once, in fixed blocks, with noise that belongs to the image."""

from collections.abc import Iterable

import numpy as np
import torch

from vaejob.config import LikelihoodConfig
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.training.step import draw_levels, evaluation_noise


@torch.no_grad()
def evaluate(
    scorer: NegativeELBO,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    dims_per_image: int,
    config: LikelihoodConfig,
    device: torch.device,
    samples: int = 1,
) -> LikelihoodTotals:
    """Totals over the blocks of (ids, uint8 images): the ELBO with one z, or the IWAE bound with `samples` of them."""
    totals = RunningTotals(dims_per_image=dims_per_image, device=device)
    for ids, images in blocks:
        noise = evaluation_noise(ids, device=device)
        on_device = torch.from_numpy(images).to(device)
        levels = draw_levels(on_device, ids, pixels=scorer.pixels, config=config, noise=noise)
        terms = scorer(levels, noise.keys)
        if samples == 1:
            totals.add(terms)
        else:
            bound = importance_bound(scorer.vae, scorer.pixels, levels, noise, samples=samples)
            totals.add(terms, negative_bound=-bound.log_likelihood)
    return totals.to_host()
