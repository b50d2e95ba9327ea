"""The ladder of codes at VDVAE's shapes, against its published step."""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.cases.case import (
    BF16,
    BF16_COMPILED,
    COMPILED,
    FP32,
    PRECISIONS,
    Found,
    in_own_processes,
    pack_pictures,
    settings,
)
from tests.benchmarks.paired import repeated, whole_job
from tests.benchmarks.peers import of_vdvae
from vaejob.likelihood.bounds import BoundTerms
from vaejob.model.noise import image_noise
from vaejob.training.step import make_scorer

BATCH, WIDTH, STEPS = 16, 64, 2
# Of either as many blocks at each resolution; theirs name each change of resolution.
THEIR_DECODER, THEIR_ENCODER = "1x1,4m1,4x2,8m4,8x3,16m8,16x4,32m16,32x5", "32x2,32d2,16x2,16d2,8x1,8d2,4x1,4d4,1x1"
OUR_LAYERS = "1x1,4x3,8x4,16x5,32x6"


def hierarchical(options: argparse.Namespace, folder: str) -> Found:
    pictures = torch.from_numpy(pack_pictures(f"{folder}/data", images=8 * BATCH)[: STEPS * BATCH])
    jobs = {
        name: settings(
            options, f"data.train={folder}/data/train", f"data.global_batch={BATCH}", "model.family=hierarchical",
            f"model.layers={OUR_LAYERS}", f"model.width={WIDTH}", "model.latent_channels=16",
            "likelihood.pixels=discretized-logistic-mixture", "likelihood.binarize=none", "optimizer.name=adamw",
            "optimizer.weight_decay=0.01", "optimizer.clip=200", "optimizer.ema=100000", *precision,
        )
        for name, precision in PRECISIONS.items()
    }  # fmt: skip
    train, vae, _ = of_vdvae.published()
    chosen = of_vdvae.hyperparameters(width=WIDTH, n_batch=BATCH, dec_blocks=THEIR_DECODER, enc_blocks=THEIR_ENCODER)
    torch.manual_seed(0)
    theirs, scorer = vae.VAE(chosen), make_scorer(jobs[FP32], shape=(3, 32, 32))
    found = Found(
        case="hierarchical",
        title=f"Hierarchical VAE, {OUR_LAYERS}, width {WIDTH}, 32x32x3, mixture of 10 logistics, batch {BATCH}",
        peer="VDVAE",
        goals={FP32: 1.5, COMPILED: 1.5, BF16: 2.2, BF16_COMPILED: 2.2},
    )
    levels = pictures[:BATCH]
    keys = image_noise(torch.arange(BATCH), seed=0, purpose="train", device="cpu").keys
    scaled = levels.permute(0, 2, 3, 1).float() / 127.5 - 1
    found.proofs = [
        compare_work(scorer, lambda: _sum(scorer(levels, keys)), theirs, lambda: theirs(scaled, scaled)["elbo"])
    ]
    ema = copy.deepcopy(theirs).requires_grad_(False)
    their_epochs = of_vdvae.epochs(train, chosen, theirs, ema, pictures)
    ours = {name: whole_job(job, images=STEPS * BATCH) for name, job in jobs.items()}
    with in_own_processes({found.peer: repeated(their_epochs), **ours}) as passes:
        return found.measure(passes, options)


def compare_work(
    ours: nn.Module, our_loss: Callable[[], Tensor], theirs: nn.Module, their_loss: Callable[[], Tensor]
) -> str:
    """Ours is in the manner of theirs, not the same function: it must not do less. Raises AssertionError if it does."""
    (our_weights, our_work), (their_weights, their_work) = size(ours, our_loss), size(theirs, their_loss)
    assert our_work >= 0.98 * their_work, (our_work, their_work)
    return (
        f"no less work: ours has {our_weights:,} weights and {our_work / BATCH / 1e9:.3f} GFLOP an image, forward and "
        f"backward; theirs {their_weights:,} and {their_work / BATCH / 1e9:.3f}; ours / theirs {our_weights / their_weights:.3f} "
        f"and {our_work / their_work:.3f}. Both clip, decay weights and average them; that the likelihoods are one is "
        "proved in the case mixture"
    )


def size(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Weights, and operations of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return sum(weight.numel() for weight in model.parameters()), counter.get_total_flops()


def _sum(terms: BoundTerms) -> Tensor:
    return (terms.distortion + terms.rate).sum()
