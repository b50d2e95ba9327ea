"""The likelihood of held-out images: each once, in fixed blocks, with noise that belongs to the image."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaejob.config import LikelihoodConfig, Precision
from vaejob.likelihood.bounds import NegativeELBO, importance_bound, log_weights, weights_of
from vaejob.likelihood.pixels import ObservationModel
from vaejob.metrics import LayerTotals, LikelihoodTotals, RunningTotals, layer_totals
from vaejob.model.noise import Noise
from vaejob.model.vae import VAE
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.heap import freed_memory_kept
from vaejob.training.passes import blocks_compiled, compiling
from vaejob.training.step import draw_levels, evaluation_noise, in_pieces

Blocks = Iterable[tuple[np.ndarray, np.ndarray]]
"""Of (ids, uint8 images)."""

LAYER_DRAWS = 8
"""Codes drawn per image to tell, of a layer given others, what the image decides from what chance decides."""
LAYER_IMAGES_AT_ONCE = 32
"""As many codes at once as an evaluation block has: of a ladder, all of them lie in memory with what made them."""


@own_arithmetic()
@torch.no_grad()
def evaluate(
    scorer: NegativeELBO,
    blocks: Blocks,
    *,
    dims_per_image: int,
    config: LikelihoodConfig,
    device: torch.device,
    samples: int = 1,
    precision: Precision = "fp32",
    compiled: bool = False,
) -> LikelihoodTotals:
    """Totals over the blocks: the ELBO with one z, or the IWAE bound with `samples` of them and what its weights tell.

    precision: of the networks' products, in encoder and decoder. Densities and likelihoods are in float32, weights in
    float64 for either: with bf16 it is the bound of a model whose weights and hidden layers are a little rounded.
    compiled: where there are several samples; it takes seconds, and changes what rounding left.
    """
    weigh = _compiled(scorer) if compiled else log_weights
    totals = RunningTotals(dims_per_image=dims_per_image, device=device)
    with freed_memory_kept(device), compiling() if compiled else nullcontext():
        for levels, noise in _levels(scorer, blocks, config=config, device=device):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                terms = scorer(levels, noise.keys)
                if samples == 1:
                    totals.add(terms)
                    continue
                bound, effective_samples = importance_bound(
                    scorer.vae, scorer.pixels, levels, noise, samples=samples, weigh=weigh
                )
            totals.add(terms, negative_bound=-bound, effective_samples=effective_samples, samples=samples)
    return totals.to_host()


def _compiled(scorer: NegativeELBO) -> Callable[..., Tensor]:
    """log_weights, compiled; of a deep model by blocks, for batches of the size that comes first and most often."""
    if not scorer.vae.blocks:
        return torch.compile(log_weights)
    by_blocks, weigh = blocks_compiled(scorer).vae, torch.compile(weights_of, dynamic=False)
    usual = 0

    def of_usual_size(vae: VAE, pixels: ObservationModel, levels: Tensor, *others: Any) -> Tensor:
        nonlocal usual
        usual = usual or len(levels)
        if len(levels) != usual:
            return log_weights(vae, pixels, levels, *others)
        return log_weights(by_blocks, pixels, levels, *others, weigh=weigh)

    return of_usual_size


@own_arithmetic()
@torch.no_grad()
def layer_diagnostics(
    scorer: NegativeELBO, blocks: Blocks, *, config: LikelihoodConfig, device: torch.device
) -> LayerTotals:
    """Rate and active units of each stochastic layer over the blocks, in one pass."""
    totals = LayerTotals()
    for levels, noise in _levels(scorer, blocks, config=config, device=device):
        for piece in in_pieces(len(levels), LAYER_IMAGES_AT_ONCE):
            encoding = scorer.vae.encode(scorer.pixels.to_inputs(levels[piece]))
            folds = Noise(noise.keys[piece]).folds(range(LAYER_DRAWS))
            layers = scorer.vae.draw(encoding, folds, samples=LAYER_DRAWS).layers
            totals += layer_totals(layers, images=len(levels[piece]), draws=LAYER_DRAWS)
    return totals


def _levels(
    scorer: NegativeELBO, blocks: Blocks, *, config: LikelihoodConfig, device: torch.device
) -> Iterator[tuple[Tensor, Noise]]:
    for ids, images in blocks:
        noise = evaluation_noise(ids, device=device)
        on_device = torch.from_numpy(images).to(device)
        yield draw_levels(on_device, ids, pixels=scorer.pixels, config=config, noise=noise), noise
