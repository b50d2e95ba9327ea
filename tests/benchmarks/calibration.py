"""Whether a short run ends where a correct implementation ends: MNIST after 10, 30 and 60 epochs, CIFAR-10 after 5.

    python tests/benchmarks/calibration.py [--mnist FOLDER] [--cifar FOLDER] [--epochs 60] [--seed 0] [--runs BUCKET]

FOLDER holds packed images in train/ and test/, as `vaejob pack` writes them; CIFAR-10's as JPEG. The bands were found
with a separate implementation, over two seeds; a value far below its band is as wrong as one above it. It takes some ten
minutes on one core.

MNIST is the recipe mnist-iwae-1: the held-out negative ELBO with one code per image, and the IWAE bound of 50. CIFAR-10 is
a plain network that is no family of ours, trained by our step on our stream: three convolutions of stride 2 to a code of
64, three transposed ones back, discretised logistics with one learnt scale for each channel, batches of 100, Adam at 1e-3.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.stepping import take_step
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.likelihood.pixels import make_pixels
from vaejob.metrics import LikelihoodTotals
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.vae import VAE
from vaejob.training.evaluate import evaluate
from vaejob.training.step import make_optimizer


class Band(NamedTuple):
    """Where a figure should end."""

    centre: float
    either_side: float


MNIST_BANDS = {  # epochs: nats of -ELBO, and of the negative IWAE bound of 50 codes
    10: (Band(104.3, 1.0), Band(99.4, 0.8)),
    30: (Band(99.4, 1.0), Band(94.4, 0.7)),
    60: (Band(97.5, 1.0), Band(92.5, 0.7)),
}
MNIST_IMAGES = 60_000
CIFAR_BANDS = {5: Band(6.53, 0.06)}  # epochs: bits/dim


class PlainConvVAE(VAE):
    """Weights as torch makes them. Shapes: B images, P = 6 pixel parameters: a mean and a log scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape = (64,)
        down = [
            nn.Sequential(nn.Conv2d(m, n, 4, stride=2, padding=1), nn.ReLU()) for m, n in ((3, 16), (16, 32), (32, 64))
        ]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(1024, 128))
        up = [
            nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(m, n, 4, stride=2, padding=1))
            for m, n in ((64, 32), (32, 16), (16, 3))
        ]
        self.decoder = nn.Sequential(nn.Linear(64, 1024), nn.Unflatten(1, (64, 4, 4)), *up)
        self.log_scale = nn.Parameter(torch.full((3, 1, 1), -2.0))

    def encode(self, inputs: Float[Tensor, "B 3 32 32"]) -> Gaussian:
        mean, log_std = self.encoder(inputs).chunk(2, dim=1)
        return gaussian(mean, log_std)

    def decode(self, z: Float[Tensor, "B 64"]) -> Float[Tensor, "B 6 32 32"]:
        mean: Tensor = self.decoder(z)
        return torch.cat((mean, self.log_scale.expand_as(mean)), dim=1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mnist", help="without it MNIST is left out")
    arguments.add_argument("--cifar", help="without it CIFAR-10 is left out")
    arguments.add_argument("--epochs", type=int, default=60, choices=MNIST_BANDS, help="of MNIST")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--runs", help="where MNIST's run is kept, and continued; default: nowhere")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        if options.mnist:
            for line, hit in mnist(options.mnist, options.runs or folder, epochs=options.epochs, seed=options.seed):
                print(line, flush=True)
                missed += not hit
        if options.cifar:
            for line, hit in cifar(options.cifar, seed=options.seed):
                print(line, flush=True)
                missed += not hit
    if missed:
        sys.exit(f"{missed} figures are outside their bands")


def mnist(data: str, runs: str, *, epochs: int, seed: int) -> Iterator[tuple[str, bool]]:
    """A line for each figure, and whether it is inside its band."""
    every = 10 * MNIST_IMAGES
    job = vaejob.load_config(
        "mnist-iwae-1",
        f"data.train={data}/train",
        f"data.test={data}/test",
        f"run.bucket={runs}",
        f"run.seed={seed}",
        f"training.images={epochs * MNIST_IMAGES}",
        f"training.evaluate_every_images={every}",
        f"checkpoint.every_images={every}",
        f"checkpoint.keep_last={max(MNIST_BANDS)}",
        "cluster.workers=0",
    )
    run, held_out = vaejob.train(job), vaejob.open_data(f"{data}/test")
    for at, (elbo, iwae) in MNIST_BANDS.items():
        if at <= epochs:
            model = vaejob.load(run, checkpoint=str(at * MNIST_IMAGES))
            for samples, band in ((1, elbo), (50, iwae)):
                totals = model.evaluate(held_out, samples=samples)
                name = f"MNIST, {at} epochs, {'-ELBO' if samples == 1 else f'-IWAE-{samples}'}"
                error = totals.standard_error("negative_bound")
                yield verdict(name, totals.mean("negative_bound"), error, "nats", band)


def cifar(data: str, *, seed: int) -> Iterator[tuple[str, bool]]:
    job = vaejob.load_config(
        "mnist-iwae-1",
        f"data.train={data}/train",
        "data.test=null",
        f"run.seed={seed}",
        "data.global_batch=100",
        "likelihood.pixels=discretized-logistic",
        "likelihood.binarize=none",
    )
    torch.manual_seed(seed)
    scorer = NegativeELBO(PlainConvVAE(), make_pixels(job.likelihood))
    optimizer, train = make_optimizer(job.optimizer, scorer), vaejob.open_data(job.data.train)
    most = max(CIFAR_BANDS) * train.manifest.images
    for batch in train.training_batches(job.data, seed=seed, images_seen=0, until=most):
        take_step(job, scorer, optimizer, batch)
        epochs = batch.place.epoch + 1
        if batch.place.stop == train.manifest.images and epochs in CIFAR_BANDS:
            totals = score(scorer, f"{data}/test", job)
            name, error = f"CIFAR-10 (JPEG), {epochs} epochs, -ELBO", totals.bits_per_dim_standard_error
            yield verdict(name, totals.bits_per_dim, error, "bits/dim", CIFAR_BANDS[epochs])


def score(scorer: NegativeELBO, data: str, job: vaejob.JobConfig) -> LikelihoodTotals:
    held_out, cpu = vaejob.open_data(data), torch.device("cpu")
    blocks = held_out.evaluation_blocks()
    return evaluate(scorer, blocks, dims_per_image=held_out.manifest.dims, config=job.likelihood, device=cpu)


def verdict(name: str, found: float, error: float, unit: str, band: Band) -> tuple[str, bool]:
    hit = abs(found - band.centre) <= band.either_side
    expected = f"{band.centre} +- {band.either_side}: {'inside' if hit else 'OUTSIDE'}"
    return f"{name}: {found:.4f} +- {error:.4f} {unit}, expected {expected}", hit


if __name__ == "__main__":
    main()
