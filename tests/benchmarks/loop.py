"""What the job around the step costs: our whole loop against the same model in a bare torch loop over data in memory.

    python tests/benchmarks/loop.py [--data ADDRESS] [--images 60000] [--rounds 7]

Ours streams shards, checks checksums, draws noise that belongs to the image, adds exact totals, reports, and writes
checkpoints; the bare loop draws from torch's generator and keeps nothing. Both take the same number of Adam steps on the
784-200-200-50 model. Rounds alternate in one process on one thread; the figure is the median over rounds of the ratio
within a round, per CPU second and by the clock, with its range.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import vaejob
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.training.step import make_optimizer, make_scorer

BATCH = 100


def pack_digits(folder: str, *, images: int) -> str:
    """scikit-learn's digits at 28x28, repeated with shifts until there are enough."""
    digits = load_digits().images
    grown = [np.asarray(Image.fromarray((d * (255 / 16)).astype("uint8")).resize((28, 28))) for d in digits]
    shifted = [np.roll(grown[i % len(grown)], i // len(grown), axis=1) for i in range(images)]
    pack(ArraySource("digits at 28x28", np.stack(shifted)[:, None]), folder)
    return f"{folder}/train"


def ours(job: vaejob.JobConfig) -> None:
    run = job.run.model_copy(update={"bucket": f"memory://{secrets.token_hex(4)}"})
    vaejob.train(job.model_copy(update={"run": run}))


def bare(job: vaejob.JobConfig, pictures: torch.Tensor, *, images: int) -> None:
    scorer: NegativeELBO = make_scorer(job, shape=(1, 28, 28))
    vae, optimizer = scorer.vae, make_optimizer(job.optimizer, scorer)
    seen = 0
    while seen < images:
        for chosen in torch.randperm(len(pictures))[: images - seen].split(BATCH):
            x = (torch.rand(len(chosen), 1, 28, 28) < pictures[chosen].float().div_(255)).float()
            posterior = vae.encode(x)
            z = posterior.mean + posterior.log_std.exp() * torch.randn_like(posterior.mean)
            distortion = torch.nn.functional.binary_cross_entropy_with_logits(vae.decode(z), x, reduction="sum")
            variance = (2 * posterior.log_std).exp()
            rate = 0.5 * (variance + posterior.mean**2 - 1 - 2 * posterior.log_std).sum()
            ((distortion + rate) / len(chosen)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(chosen)


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--images", type=int, default=60_000)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or pack_digits(folder, images=20_000)
        job = vaejob.load_config(
            "mnist-iwae-1",
            f"data.train={data}",
            "data.test=null",
            "cluster.workers=0",
            f"training.images={options.images}",
            "training.report_every_images=10000",
            "checkpoint.every_images=30000",
        )
        pictures = torch.from_numpy(all_images(data))
        ratios = []
        for turn in range(-1, options.rounds):  # the first round warms up
            pair = {"ours": lambda: ours(job), "bare": lambda: bare(job, pictures, images=options.images)}
            found = {name: seconds(pair[name]) for name in sorted(pair, reverse=turn % 2 == 0)}
            if turn >= 0:
                ratios.append([a / b for a, b in zip(found["bare"], found["ours"], strict=True)])
                rates = {name: options.images / wall for name, (_, wall) in found.items()}
                print(f"ours {rates['ours']:,.0f} images/s, bare {rates['bare']:,.0f}, load {os.getloadavg()[0]:.1f}")
    for name, column in zip(("per CPU second", "by the clock"), zip(*ratios, strict=True), strict=True):
        print(f"ours / bare {name}: {statistics.median(column):.3f} [{min(column):.3f}, {max(column):.3f}]")


def all_images(data: str) -> np.ndarray:
    """Every image of a data set, in memory."""
    return np.concatenate([images for _, images in vaejob.open_data(data).evaluation_blocks()])


if __name__ == "__main__":
    main()
