"""Held-out likelihood by 5,000 importance samples: ours beside pythae's get_nll, the same weights in both.

    python tests/benchmarks/scoring.py [--train ADDRESS --test ADDRESS] [--images 20] [--samples 5000] [--rounds 5]

The model is that of the recipe mnist-iwae-1 (784-200-200-50 and back, Bernoulli pixels, here by a threshold at half), trained
for a moment by our own loop. pythae gets an encoder and a decoder of the very same modules. First both are proved to do the
same work: on the same codes they give the same bound for each image. Then they take turns on one thread, each with the
same images and number of samples: theirs as it comes, which records what a gradient would need, and as a knowing user would
call it, under torch.no_grad and in larger batches; ours also with products in bfloat16, whose number is printed beside the
other. The figures are CPU seconds per image and sample, and the median over rounds of theirs / ours with its range, for each
of theirs and ours. What 10,000 images would take is multiplied out, and said to be.

Last come the places where their number is not what it is called, each measured on these images.
"""

import argparse
import math
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.loop import pack_digits
from vaejob.data.batches import DataSet
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.likelihood.bounds import importance_bound
from vaejob.loaded import LoadedModel
from vaejob.model.mlp import DenseVAE
from vaejob.model.noise import LATENT
from vaejob.training.step import evaluation_noise


class Call(NamedTuple):
    """One way to call get_nll."""

    gradients: bool
    batch: int

    def __str__(self) -> str:
        return f"get_nll{'' if self.gradients else ' under no_grad'}, batches of {self.batch}"


CALLS = (Call(gradients=True, batch=100), Call(gradients=False, batch=100), Call(gradients=False, batch=500))
"""The first is what it does when it is called."""
MNIST_TEST = 10_000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--train", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--test", help="address of the images to score; default: of the same digits")
    arguments.add_argument("--images", type=int, default=20, help="scored by each in every round")
    arguments.add_argument("--samples", type=int, default=5000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--trained-images", type=int, default=60_000)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = options.train or pack_digits(folder, images=20_000)
        model, data = trained(train, options.test or train, folder, options)
        peer = peer_model(model)
        prove_equal(model, peer, data)
        timed(model, peer, data, options)
        errors(model, peer, data)


def trained(train: str, test: str, folder: str, options: argparse.Namespace) -> tuple[LoadedModel, DataSet]:
    """The model, and the first images of the test data as a data set of their own."""
    images = vaejob.open_data(test).images(np.arange(options.images))
    pack(ArraySource("scored", images), f"{folder}/scored", split="test")
    job = vaejob.load_config(
        "mnist-iwae-1", f"data.train={train}", "data.test=null", f"run.bucket=memory://{secrets.token_hex(4)}",
        "likelihood.binarize=threshold", "cluster.workers=0", f"training.images={options.trained_images}",
    )  # fmt: skip
    return vaejob.load(vaejob.train(job)), vaejob.open_data(f"{folder}/scored/test")


def peer_model(model: LoadedModel) -> Any:
    """pythae's VAE around our modules."""
    from tests.benchmarks.peers.of_pythae import dense_peer

    vae = model.scorer.vae
    assert isinstance(vae, DenseVAE)
    return dense_peer(vae).eval()


def binary(data: DataSet) -> Tensor:
    return (torch.from_numpy(data.images(np.arange(data.manifest.images))) >= 128).to(torch.uint8)


@torch.no_grad()
def ours_alone(model: LoadedModel, data: DataSet, *, samples: int) -> Tensor:
    """log p(x) from below, of each image."""
    noise = evaluation_noise(np.arange(data.manifest.images), device=torch.device("cpu"))
    scorer = model.scorer
    return importance_bound(scorer.vae, scorer.pixels, binary(data), noise, samples=samples).log_likelihood


def theirs(peer: Any, levels: Tensor, *, samples: int, batch: int, gradients: bool = False) -> float:
    """What get_nll returns: in spite of its name the mean log-likelihood, without a minus."""
    with torch.set_grad_enabled(gradients):
        return float(peer.get_nll(levels.float(), n_samples=samples, batch_size=batch))


@torch.no_grad()
def prove_equal(model: LoadedModel, peer: Any, data: DataSet, *, samples: int = 100) -> None:
    """On our codes, theirs gives our bound: image by image, within 2e-3 nats of float32 sums over 784 pixels."""
    levels, found = binary(data), ours_alone(model, data, samples=samples)
    noise = evaluation_noise(np.arange(len(levels)), device=torch.device("cpu"))
    drawn, draw = noise.folds(range(samples)).normal(LATENT, (50,)).view(samples, len(levels), 50), peer._sample_gauss
    gaps = []
    for i in range(len(levels)):
        peer._sample_gauss = lambda mean, std, i=i: (mean + std * drawn[:, i], drawn[:, i])
        gaps.append(abs(theirs(peer, levels[i : i + 1], samples=samples, batch=samples) - found[i].item()))
    peer._sample_gauss = draw
    assert max(gaps) < 2e-3, gaps
    print(
        f"equal on the same {samples} codes of {len(gaps)} images: at most {max(gaps):.1e} nats apart of {-found.mean():.1f}"
    )


def cpu_seconds(work: Callable[[], float]) -> tuple[float, float]:
    began = time.process_time()
    nats = work()
    return time.process_time() - began, nats


def timed(model: LoadedModel, peer: Any, data: DataSet, options: argparse.Namespace) -> None:
    levels, samples, pairs = binary(data), options.samples, options.images * options.samples
    passes: dict[str, Callable[[], float]] = {
        str(call): lambda call=call: theirs(peer, levels, samples=samples, **call._asdict())  # type: ignore[misc]
        for call in CALLS
    }
    passes["ours"] = lambda: -model.evaluate(data, samples=samples).mean("negative_bound")
    for precision, compiled in (("fp32", True), ("bf16", False), ("bf16", True)):
        passes[f"ours in {precision}{', compiled' if compiled else ''}"] = lambda how=(precision, compiled): (
            -model.evaluate(data, samples=samples, precision=how[0], compiled=how[1]).mean("negative_bound")
        )
    rounds: list[dict[str, float]] = []
    for turn in range(-1, options.rounds):  # the first round warms up
        found = {name: cpu_seconds(passes[name]) for name in sorted(passes, reverse=turn % 2 == 0)}
        if turn < 0:
            print("; ".join(f"{name}: {nats:.3f} nats" for name, (_, nats) in found.items()))
            continue
        rounds.append({name: 1e6 * seconds / pairs for name, (seconds, _) in found.items()})
        told = ", ".join(f"{name} {us:.2f} us" for name, us in rounds[-1].items())
        print(f"round {turn + 1}: {told} per image and sample; load {os.getloadavg()[0]:.1f}", flush=True)
    for name in passes:
        us = statistics.median(one[name] for one in rounds)
        hours = us * 1e-6 * MNIST_TEST * samples / 3600
        print(f"{name}: {us:.2f} us per image and sample; {MNIST_TEST:,} images multiplied out: {hours:.2f} CPU hours")
    for call in CALLS:
        for ours in (name for name in passes if name.startswith("ours")):
            ratios = [one[str(call)] / one[ours] for one in rounds]
            print(
                f"{call} / {ours}, CPU seconds: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            )


@torch.no_grad()
def errors(model: LoadedModel, peer: Any, data: DataSet) -> None:
    """Each line: what was asked for, what get_nll gives, and what is right."""
    levels = binary(data)
    torch.manual_seed(0)
    few = [theirs(peer, levels, samples=2, batch=100) for _ in range(5)]
    ours = {k: ours_alone(model, data, samples=k).mean().item() for k in (2, 100, 200, 299)}
    print(
        f"2 samples: theirs {statistics.mean(few):.2f} nats, which is ours of 100 ({ours[100]:.2f}); of 2 it is {ours[2]:.2f}"
    )
    calls: list[int] = []
    decode = peer.decoder.forward
    peer.decoder.forward = lambda z: (calls.append(len(z)), decode(z))[1]
    theirs(peer, levels[:1], samples=299, batch=100)
    peer.decoder.forward = decode
    print(f"299 samples: theirs draws {sum(calls)}")
    print(f"twice the same call: theirs {few[0]:.4f} and {few[1]:.4f}; ours {ours[2]:.4f} and "
          f"{ours_alone(model, data, samples=2).mean().item():.4f}")  # fmt: skip
    for logit in (20.0, 60.0, 200.0):
        zero = torch.zeros(1)
        told = -nn.functional.binary_cross_entropy(torch.tensor([logit]).sigmoid(), zero).item()
        right = model.scorer.pixels.log_prob(
            torch.full((1, 1, 1, 1), logit), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        )
        print(f"a dark pixel of logit {logit:.0f}: theirs {told:.2f} nats, right {right.item():.2f}")
    training_loss(model, peer, levels)


def training_loss(model: LoadedModel, peer: Any, levels: Tensor, *, samples: int = 1000) -> None:
    """pythae's IWAE chooses its best model by this loss."""
    from pythae.models import IWAE, IWAEConfig

    torch.manual_seed(0)
    config = IWAEConfig(input_dim=(1, 28, 28), latent_dim=50, reconstruction_loss="bce", number_samples=samples)
    iwae = IWAE(config, encoder=peer.encoder, decoder=peer.decoder).eval()
    loss = np.mean([iwae({"data": x[None].float()}).loss.item() for x in levels])
    noise = evaluation_noise(np.arange(len(levels)), device=torch.device("cpu"))
    bound = importance_bound(model.scorer.vae, model.scorer.pixels, levels, noise, samples=samples).log_likelihood
    print(
        f"IWAE-{samples} in training: theirs reports {-loss:.2f} nats, the bound is {bound.mean().item():.2f}: "
        f"{-loss - bound.mean().item():.2f} too good (log K - H of the weights; log K is {math.log(samples):.2f})"
    )


if __name__ == "__main__":
    main()
