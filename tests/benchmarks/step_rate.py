"""What streaming costs the training step: the same steps on images streamed from S3, resident, and held in memory.

    python tests/benchmarks/step_rate.py [--data ADDRESS] [--images 60000] [--rounds 7] [--threads 1]

The server is a real one on this machine (tests/s3/server.py) and takes CPU time from the step, as a remote one would not.
The model is that of the recipe mnist-iwae-1, batch 100. Resident images (data.resident_bytes) are taken by index from one
tensor, those in memory are batches made before. Rounds alternate; all take the same batches in the same order, and the clock
runs from the first batch to the last. The figures are the medians over rounds of streamed and resident / in memory, by the
clock and by the CPU time of the whole process, with their range.

Where the time goes is told in microseconds an image, medians over rounds: the training thread's CPU time, its wait for a
batch, and the rest of the clock, in which it wanted to run and did not: it waits for the interpreter's lock, which the
reading threads hold, or for a core. Each such wait is a voluntary switch.
"""

import argparse
import os
import resource
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
from tests.benchmarks.stepping import take_step
from tests.s3.server import client, running, which_server
from vaejob.data.batches import Batch
from vaejob.storage import open_bucket
from vaejob.training.resident import Resident, ready_for
from vaejob.training.step import make_optimizer, make_scorer

BUCKET = "step-rate"


class Costs(NamedTuple):
    """One pass of training, in microseconds an image."""

    clock: float
    cpu: float
    """Of the training thread."""
    waited: float
    """For a batch."""
    switches: float
    """Times that the training thread gave up its core of itself, in 100 images: a step."""
    process_cpu: float
    """Of all threads, the reader's among them."""

    @property
    def held_up(self) -> float:
        return self.clock - self.cpu - self.waited


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
        until = f"training.images={options.images}"
        job = vaejob.load_config("mnist-iwae-1", f"data.train={remote.url}", "data.test=null", until)
        held = list(batches(job, images=options.images))
        kept = resident(job)
        rounds: list[dict[str, Costs]] = []
        for turn in range(-1, options.rounds):  # the first round warms up
            passes = {
                "streamed": lambda: batches(job, images=options.images),
                "resident": lambda: kept.batches(job, images_seen=0, read_before=(0, 0)),
                "in memory": lambda: held,
            }
            found = {name: steps(job, passes[name]()) for name in sorted(passes, reverse=turn % 2 == 0)}
            if turn >= 0:
                rounds.append(found)
                rates = ", ".join(f"{name} {1e6 / costs.clock:,.0f} images/s" for name, costs in found.items())
                print(f"{rates}, load {os.getloadavg()[0]:.1f}", flush=True)
    say(rounds)


def say(rounds: list[dict[str, Costs]]) -> None:
    for name in ("streamed", "resident"):
        for what, of in (
            ("by the clock", lambda costs: costs.clock),
            ("per CPU second", lambda costs: costs.process_cpu),
        ):
            ratios = [of(found["in memory"]) / of(found[name]) for found in rounds]
            print(f"{name} / in memory, {what}: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    for name in ("in memory", "resident", "streamed"):
        costs = [found[name] for found in rounds]
        clock, cpu, waited, switches, process, held_up = (
            statistics.median(values) for values in zip(*((*c, c.held_up) for c in costs), strict=True)
        )
        print(
            f"{name:>9}: {clock:.1f} us an image = {cpu:.1f} on the core + {waited:.1f} waiting for a batch + {held_up:.1f} "
            f"held up, {switches:.1f} switches a step; other threads {process - cpu:.1f} us of CPU"
        )


class Clocks(NamedTuple):
    """Of this thread and process, in seconds."""

    clock: float = 0.0
    cpu: float = 0.0
    process: float = 0.0
    switches: int = 0

    @classmethod
    def read(cls) -> "Clocks":
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        return cls(time.perf_counter(), time.thread_time(), time.process_time(), switches)


Source = Iterable[tuple[Batch, torch.Tensor]]


def resident(job: vaejob.JobConfig) -> Resident:
    """As it is after an epoch."""
    data = vaejob.open_data(job.data.train)
    kept = Resident(data, Alone())
    for batch, images in batches(job, images=data.manifest.images):
        kept.keep(batch, images)
    return kept


class Alone:
    """The only worker, of which only this is asked."""

    rank, world_size, processes_here, device = 0, 1, 1, torch.device("cpu")


def batches(job: vaejob.JobConfig, *, images: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    given = vaejob.open_data(job.data.train).training_batches(job.data, seed=0, images_seen=0, until=images)
    return ready_for(torch.device("cpu"), given)


def steps(job: vaejob.JobConfig, source: Source) -> Costs:
    scorer = make_scorer(job, shape=(1, 28, 28))
    optimizer = make_optimizer(job.optimizer, scorer)
    given, began, images, waited = iter(source), Clocks(), 0, 0.0
    while True:
        asked = time.perf_counter()
        if (ready := next(given, None)) is None:
            clock, cpu, process, switches = (now - then for now, then in zip(Clocks.read(), began, strict=True))
            return Costs(
                *(1e6 * each / images for each in (clock, cpu, waited)), 100 * switches / images, 1e6 * process / images
            )
        if not images:
            began = Clocks.read()
            asked = began.clock
        waited += time.perf_counter() - asked
        batch, pictures = ready
        take_step(job, scorer, optimizer, batch, pictures)
        images += len(batch.ids)


if __name__ == "__main__":
    main()
