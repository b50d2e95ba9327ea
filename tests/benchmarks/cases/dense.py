"""The dense model 784-200-200-50, as a VAE and as an IWAE, against pythae's trainer."""

import argparse
import copy
import math

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.cases.case import FP32, PRECISIONS, Found, gradients, in_own_processes, relative, settings
from tests.benchmarks.loop import all_images, pack_digits
from tests.benchmarks.paired import repeated, whole_job
from tests.benchmarks.peers.of_pythae import dense_peer, epochs, with_noise
from vaejob.config import JobConfig
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.model.noise import LATENT
from vaejob.training.step import make_scorer, training_noise

TOLERANCE = 1e-5
"""Of loss and gradient in float32, relative."""
IMPORTANCE_SAMPLES = 50


def mlp100(options: argparse.Namespace, folder: str) -> Found:
    return _elbo("mlp100", options, folder, batch=100, images=20_000, goal=2.0)


def mlp20(options: argparse.Namespace, folder: str) -> Found:
    return _elbo("mlp20", options, folder, batch=20, images=8_000, goal=2.5)


def _elbo(case: str, options: argparse.Namespace, folder: str, *, batch: int, images: int, goal: float) -> Found:
    found = Found(
        case=case,
        title=f"Dense VAE 784-200-200-50, Bernoulli, batch {batch}",
        peer="pythae",
        goals=dict.fromkeys(PRECISIONS, goal),
    )
    return _against_pythae(found, options, folder, images=images, own=[f"data.global_batch={batch}"])


def iwae50(options: argparse.Namespace, folder: str) -> Found:
    found = Found(
        case="iwae50",
        title=f"The same as IWAE, k = {IMPORTANCE_SAMPLES}, batch 20",
        peer="pythae",
        goals=dict.fromkeys(PRECISIONS, 5.0),
    )
    own = ["data.global_batch=20", "objective.bound=iwae", f"objective.samples={IMPORTANCE_SAMPLES}"]
    return _against_pythae(found, options, folder, images=400, own=own)


def _against_pythae(found: Found, options: argparse.Namespace, folder: str, *, images: int, own: list[str]) -> Found:
    data = options.data or pack_digits(folder, images=20_000)
    binary = (torch.from_numpy(all_images(data)[:images]) >= 128).float()
    # Thresholds, so that neither has to draw pixels: the peer does not.
    common = [f"data.train={data}", "likelihood.binarize=threshold", *own]
    jobs = {name: settings(options, *common, *precision) for name, precision in PRECISIONS.items()}
    batch, samples = jobs[FP32].data.global_batch, jobs[FP32].objective.samples
    scorer = make_scorer(jobs[FP32], shape=(1, 28, 28))
    found.proofs = prove_equal(scorer, jobs[FP32], binary[:batch])
    peer = dense_peer(copy.deepcopy(scorer.vae), importance_samples=samples if samples > 1 else 0)
    theirs = epochs(peer, binary, batch=batch, folder=f"{folder}/pythae")
    ours = {name: whole_job(job, images=images) for name, job in jobs.items()}
    with in_own_processes({found.peer: repeated(theirs), **ours}) as passes:
        return found.measure(passes, options)


def prove_equal(scorer: NegativeELBO, job: JobConfig, inputs: Tensor) -> list[str]:
    """The same weights and noise give the same loss and gradient. pythae's IWAE reports another loss of the same gradient."""
    samples, ids = job.objective.samples, np.arange(len(inputs))
    noise = training_noise(ids, seed=0, epoch=0, device=torch.device("cpu"))
    ours, vae = copy.deepcopy(scorer), copy.deepcopy(scorer.vae)
    terms = ours(inputs.to(torch.uint8), noise.keys, job.objective)
    own_loss = (terms.distortion + terms.rate if terms.negative_bound is None else terms.negative_bound).mean()
    own_loss.backward()
    own = own_loss.item()
    if samples > 1:
        drawn = noise.folds(range(samples)).normal(LATENT, vae.latent_shape)
        eps = drawn.view(samples, len(inputs), -1).transpose(0, 1)
    else:
        eps = noise.normal(LATENT, vae.latent_shape)
    peer = with_noise(dense_peer(vae, importance_samples=samples if samples > 1 else 0), eps)
    their_loss = peer({"data": inputs}).loss
    their_loss.backward()
    theirs = their_loss.item()
    apart, gap = relative(gradients(ours.vae), gradients(vae)), abs(own / theirs - 1)
    assert apart < 10 * TOLERANCE, f"gradients differ by {apart:.1e}"
    assert samples > 1 or gap < TOLERANCE, f"losses differ by {gap:.1e}"
    reported = (
        ""
        if samples == 1
        else f" (pythae's is the mean of the log-weights, ours their log-mean; log k is {math.log(samples):.2f})"
    )
    return [
        f"equal work: on the same weights and noise gradients differ by {apart:.1e} of their norm; "
        f"losses {own:.4f} and {theirs:.4f} nats{reported}"
    ]
