"""What streaming costs the training step: the same steps on images streamed from S3, and on images held in memory.

    python tests/benchmarks/step_rate.py [--data ADDRESS] [--images 60000] [--rounds 7] [--threads 1]

The server is a real one on this machine (tests/s3/server.py) and takes CPU time from the step, as a remote one would not.
The model is that of the recipe mnist-iwae-1, batch 100. Rounds alternate; both take the same batches in the same order, and
the clock runs from the first batch to the last. The figure is the median over rounds of streamed / in memory, by the clock,
with its range; beside it the share of the time that the step waited for images.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.loop import pack_digits
from tests.s3.server import client, running, which_server
from vaejob.data.batches import Batch
from vaejob.storage import open_bucket
from vaejob.training.step import make_optimizer, make_scorer, train_step

BUCKET = "step-rate"


class Rate(NamedTuple):
    """One pass of training."""

    images_per_s: float
    waited: float
    """Share of the time."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--images", type=int, default=60_000)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=1, help="of the step")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    server_kind = which_server()
    assert server_kind, "no S3 server is installed"
    with tempfile.TemporaryDirectory() as folder, running(server_kind, Path(folder) / "server") as server:
        os.environ.update(server.environment)
        client(server).create_bucket(Bucket=BUCKET)
        local = open_bucket(options.data or pack_digits(folder, images=60_000))
        remote = open_bucket(f"s3://{BUCKET}/train")
        for key in local.keys():  # noqa: SIM118 - a bucket is no dict
            remote.write(key, local.read(key))
        job = vaejob.load_config("mnist-iwae-1", f"data.train={remote.url}", "data.test=null")
        held = list(batches(job, images=options.images))
        ratios = []
        for turn in range(-1, options.rounds):  # the first round warms up
            passes = {"streamed": lambda: batches(job, images=options.images), "in memory": lambda: held}
            found = {name: steps(job, passes[name]()) for name in sorted(passes, reverse=turn % 2 == 0)}
            if turn >= 0:
                ratios.append(found["streamed"].images_per_s / found["in memory"].images_per_s)
                rates = ", ".join(f"{name} {rate.images_per_s:,.0f} images/s" for name, rate in found.items())
                print(f"{rates}, waited {found['streamed'].waited:.1%}, load {os.getloadavg()[0]:.1f}")
    print(f"streamed / in memory: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


def batches(job: vaejob.JobConfig, *, images: int) -> Iterator[Batch]:
    return vaejob.open_data(job.data.train).training_batches(job.data, seed=0, images_seen=0, until=images)


def steps(job: vaejob.JobConfig, source: Iterable[Batch]) -> Rate:
    scorer = make_scorer(job, shape=(1, 28, 28))
    optimizer = make_optimizer(job.optimizer, scorer)
    given, began, images, waited = iter(source), 0.0, 0, 0.0
    while True:
        asked = time.perf_counter()
        if (batch := next(given, None)) is None:
            return Rate(images / (asked - began), waited / (asked - began))
        if not began:
            began = asked = time.perf_counter()
        waited += time.perf_counter() - asked
        train_step(
            scorer,
            optimizer,
            torch.from_numpy(batch.images),
            batch.ids,
            job=job,
            pixels=scorer.pixels,
            epoch=batch.place.epoch,
            beta=1.0,
            learning_rate=1e-3,
            weight=1 / batch.place.images,
        )
        images += len(batch.ids)


if __name__ == "__main__":
    main()
