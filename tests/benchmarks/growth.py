"""How cost grows: CPU time and memory against batch, depth, resolution, workers and shards, with fitted exponents.

    python tests/benchmarks/growth.py [--only WHAT ...] [--repeats 7] [--json FILE]

Every point is a fresh process with one thread. Training steps are of our `train_step` on images in memory, reading is of one
rank's batches out of a folder. The exponent p is that of cost = a n^p, by least squares over logarithms; 1 is proportional
to n, and what is to stay the same for each image or rank has 0. Memory is the peak that the work adds to the process.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from vaejob.config import DataConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.training.step import make_optimizer, make_scorer, train_step

SLACK = 0.05
"""Of the exponent of time, for noise."""
IMAGES = 16_384


class Cost(NamedTuple):
    seconds: float
    """CPU time, of a step or of an image."""
    megabytes: float


class Growth(NamedTuple):
    """One quantity that is made larger."""

    of: str
    values: tuple[int, ...]
    most: float
    """Largest exponent of time that is no superlinear term."""
    cost: Callable[[int, int], Cost]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--only", nargs="+", choices=GROWTHS, default=list(GROWTHS), metavar="WHAT", help=", ".join(GROWTHS)
    )
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--json", type=Path, help="a file for every single point")
    arguments.add_argument("--value", type=int, help=argparse.SUPPRESS)  # one point, in this process
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.value is not None:
        print(json.dumps(GROWTHS[options.only[0]].cost(options.value, options.repeats)))
        return
    found = {
        name: {value: point(name, value, options.repeats) for value in GROWTHS[name].values} for name in options.only
    }
    for name, costs in found.items():
        say(name, costs)
    if options.json:
        options.json.write_text(json.dumps(found))


def point(name: str, value: int, repeats: int) -> Cost:
    command = [sys.executable, __file__, "--only", name, "--value", str(value), "--repeats", str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(*json.loads(answer.stdout.splitlines()[-1]))


def say(name: str, costs: dict[int, Cost]) -> None:
    growth = GROWTHS[name]
    time_exponent, memory_exponent = (exponent(costs, field) for field in ("seconds", "megabytes"))
    verdict = "no superlinear term" if time_exponent <= growth.most + SLACK else "superlinear"
    points = ", ".join(f"{n}: {1e3 * c.seconds:.3g} ms, {c.megabytes:.0f} MB" for n, c in costs.items())
    print(
        f"{growth.of}: time ~ n^{time_exponent:.2f}, memory ~ n^{memory_exponent:.2f}; at most {growth.most:g}: {verdict} "
        f"({points}); load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def exponent(costs: dict[int, Cost], field: str) -> float:
    values = [max(getattr(cost, field), 1e-9) for cost in costs.values()]
    return float(np.polyfit(np.log(list(costs)), np.log(values), 1)[0])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training(*settings: str, batch: int, shape: tuple[int, int, int], repeats: int) -> Cost:
    job = vaejob.load_config("mnist-iwae-1", "data.train=nowhere", "run.bucket=nowhere", *settings)
    scorer = make_scorer(job, shape=shape)
    optimizer, ids = make_optimizer(job.optimizer, scorer), np.arange(batch)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, *shape), dtype=np.uint8))
    before = peak_mb()

    def step() -> None:
        train_step(
            scorer, optimizer, images, ids, job=job, pixels=scorer.pixels, epoch=0, beta=1.0, learning_rate=1e-4,
            weight=1 / batch,
        )  # fmt: skip

    return Cost(median_seconds(step, repeats), peak_mb() - before)


def median_seconds(work: Callable[[], None], repeats: int) -> float:
    """CPU seconds; the first call warms up, and short work is done so often that the clock can tell."""
    work()
    began = time.process_time()
    work()
    often, seconds = max(1, round(0.2 / max(time.process_time() - began, 1e-4))), []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(often):
            work()
        seconds.append((time.process_time() - began) / often)
    return statistics.median(seconds)


def of_batch(batch: int, repeats: int) -> Cost:
    return training("likelihood.binarize=dynamic", batch=batch, shape=(1, 28, 28), repeats=repeats)


def of_depth(blocks: int, repeats: int) -> Cost:
    own = ["model.family=hierarchical", f"model.layers=16x{blocks}", "model.width=32"]
    return training(*own, batch=8, shape=(1, 16, 16), repeats=repeats)


def of_pixels(pixels: int, repeats: int) -> Cost:
    side = round(pixels**0.5)
    own = ["model.family=conv", "likelihood.pixels=discretized-logistic", "likelihood.binarize=none"]
    return training(*own, batch=8, shape=(3, side, side), repeats=repeats)


def of_workers(workers: int, repeats: int) -> Cost:
    """Reading, for each image of one rank of so many."""
    return reading(shards=16, workers=workers, repeats=repeats)


def of_shards(shards: int, repeats: int) -> Cost:
    return reading(shards=shards, workers=1, repeats=repeats)


def reading(*, shards: int, workers: int, repeats: int) -> Cost:
    """A rank reads as many images whatever the number of workers: in as many epochs."""
    with tempfile.TemporaryDirectory() as folder:
        packing = multiprocessing.get_context("fork").Process(target=pack_noise, args=(folder, shards))
        packing.start()  # what it takes is no memory of the reading
        packing.join()
        data, config, before = (
            vaejob.open_data(f"{folder}/train"),
            DataConfig(train=folder, global_batch=64 * workers),
            peak_mb(),
        )

        def epochs() -> None:
            until = IMAGES * workers
            for _ in data.training_batches(config, seed=0, images_seen=0, until=until, rank=0, world_size=workers):
                pass

        return Cost(median_seconds(epochs, repeats) / IMAGES, peak_mb() - before)


def pack_noise(folder: str, shards: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (IMAGES, 1, 28, 28), dtype=np.uint8)
    part = pictures.nbytes // shards
    pack(ArraySource("noise", pictures), folder, shard_bytes=part, row_group_bytes=min(part, 2**18))


GROWTHS = {
    "batch": Growth("a step against its batch", (25, 50, 100, 200, 400, 800), 1.0, of_batch),
    "depth": Growth("a step against the blocks of a ladder", (2, 4, 8, 16, 32), 1.0, of_depth),
    "pixels": Growth("a step against pixels", (16**2, 32**2, 64**2, 128**2), 1.0, of_pixels),
    "workers": Growth("reading an image against workers", (1, 2, 4, 8, 16), 0.0, of_workers),
    "shards": Growth("reading an image against shards", (1, 4, 16, 64), 0.0, of_shards),
}


if __name__ == "__main__":
    main()
