"""What the job around the step costs: the whole job on a cluster, against the bare step of as many processes.

    python tests/benchmarks/job.py [--rounds 5] [--seconds 30] [--data ADDRESS] [--json FILE] [--set KEY=VALUE ...]

Ours is `vaejob.train`: Ray Train on a cluster of its own, 2 workers, images streamed from a real S3 server on this machine,
reports, asynchronous checkpoints to that server. The bare step is torchrun's: 2 processes, our `train_step` under DDP, with
images in memory, no stream, no totals, no reports. Both train the dense model of mnist-iwae-1 on global batches of 200. They
take turns; the figure is the ratio of images/s by the clock, and per CPU second of each side's whole process tree (Ray's
own processes count, the server's do not). Rates are slopes: images seen against time and CPU time, over the reports behind
the first ten seconds. Both also run with 1 worker and half the batch: for the scaling, and for the ratio where Ray, the server
and the reading threads have a core that the workers do not fill.

Last, what one call of `Worker.report` costs each of two workers under Ray.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.loop import all_images, pack_digits
from tests.benchmarks.paired import Spread, spread
from tests.ranks import leave
from tests.s3.server import client, running, which_server
from vaejob.data.batches import open_data
from vaejob.storage import open_bucket
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.step import make_optimizer, make_scorer, train_step
from vaejob.training.worker import Event, Report

GOAL, BUCKET, WARM_UP_SECONDS, BATCH = 0.97, "job-benchmark", 10.0, 100
"""Images of a batch are for each worker."""


class Moment(NamedTuple):
    """How far a side has come."""

    images: int
    clock: float
    cpu: float
    """Of its process tree."""


class Rate(NamedTuple):
    """Images a second."""

    by_clock: float
    by_cpu: float


def main() -> None:
    options = parse_options()
    if options.side:
        {"ours": ours, "bare": bare, "reports": reports}[options.side](options)
        return
    kind = which_server()
    assert kind, "no S3 server is installed"
    with tempfile.TemporaryDirectory() as folder, running(kind, Path(folder) / "s3") as server, server.as_environment():
        client(server).create_bucket(Bucket=BUCKET)
        local, remote = (
            open_bucket(options.data or pack_digits(folder, images=20_000)),
            open_bucket(f"s3://{BUCKET}/train"),
        )
        for key in local.keys():  # noqa: SIM118 - a bucket is no dict
            remote.write(key, local.read(key))
        sides: dict[str, Callable[[], Rate]] = {
            "bare": lambda: run_side("bare", 2, local.url, options),
            "ours": lambda: run_side("ours", 2, remote.url, options),
            "bare, 1 worker": lambda: run_side("bare", 1, local.url, options),
            "ours, 1 worker": lambda: run_side("ours", 1, remote.url, options),
        }
        rounds = []
        for turn in range(options.rounds):
            names = sorted(sides, reverse=turn % 2 == 1)
            rounds.append({name: sides[name]() for name in names})
            told = "; ".join(
                f"{name} {rate.by_clock:,.0f} images/s, {rate.by_cpu:,.0f} per CPU s"
                for name, rate in rounds[-1].items()
            )
            print(f"round {turn + 1}: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
        say(rounds)
        print(f"report: {start('reports', 2, remote.url, options).strip()}")
    if options.json:
        options.json.write_text(json.dumps(rounds))


def parse_options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--seconds", type=float, default=30.0, help="of each side in every round, behind its warm-up"
    )
    arguments.add_argument("--data", help="address of packed 28x28 images; default: scikit-learn's digits, enlarged")
    arguments.add_argument("--json", type=Path, help="a file for every single rate")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the job")
    arguments.add_argument("--side", choices=["ours", "bare", "reports"], help=argparse.SUPPRESS)
    arguments.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    return arguments.parse_args()


def say(rounds: list[dict[str, Rate]]) -> None:
    def ratios(one: str, other: str, field: str) -> Spread:
        return spread([getattr(turn[one], field) / getattr(turn[other], field) for turn in rounds])

    for name, field in (("by the clock", "by_clock"), ("per CPU second", "by_cpu")):
        for workers in ("", ", 1 worker"):
            found = ratios(f"ours{workers}", f"bare{workers}", field)
            verdict = f"goal >= {GOAL}: {'met' if found.least >= GOAL else 'missed'}"
            print(f"whole job / bare step{workers}, images {name}: {found}, {verdict}")
        print(f"2 workers / 1, images {name}: {ratios('ours', 'ours, 1 worker', field)}")


def start(side: str, workers: int, data: str, options: argparse.Namespace) -> str:
    """The last line of what a fresh process wrote."""
    own = [
        "--side",
        side,
        "--workers",
        str(workers),
        "--data",
        data,
        "--seconds",
        str(options.seconds),
        "--set",
        *options.set,
    ]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if side == "bare" else []
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
    }
    answer = subprocess.run(
        [sys.executable, *launcher, __file__, *own], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return answer.stdout.splitlines()[-1]


def run_side(side: str, workers: int, data: str, options: argparse.Namespace) -> Rate:
    return slope([Moment(*moment) for moment in json.loads(start(side, workers, data, options))])


def slope(moments: list[Moment]) -> Rate:
    """By least squares: reports come about once a second, and not quite on time."""
    assert len(moments) >= 5, f"only {len(moments)} reports came: raise --seconds"
    images, clock, cpu = np.array(moments, dtype=np.float64).T
    return Rate(np.polyfit(clock, images, 1)[0], np.polyfit(cpu, images, 1)[0])


def settings(options: argparse.Namespace) -> vaejob.JobConfig:
    return vaejob.load_config(
        "mnist-iwae-1", f"data.train={options.data}", "data.test=null", f"data.global_batch={BATCH * options.workers}",
        f"run.bucket=s3://{BUCKET}/runs-{os.getpid()}", f"cluster.workers={options.workers}", "training.images=1000000000",
        "training.report_every_images=10000", "training.evaluate_every_images=0", "checkpoint.every_images=120000", *options.set,
    )  # fmt: skip


def ours(options: argparse.Namespace) -> None:
    """Prints the moments of its reports."""
    moments: list[Moment] = []

    def note(event: Event) -> None:
        if event.kind == "row" and event.body["split"] == "train":
            moments.append(Moment(event.body["images_seen"], time.perf_counter(), tree_cpu_seconds(psutil.Process())))

    def enough() -> bool:
        return bool(moments) and moments[-1].clock - moments[0].clock > WARM_UP_SECONDS + options.seconds

    vaejob.train(settings(options), on_event=note, should_stop=enough)
    print(json.dumps(steady(moments)))


def steady(moments: list[Moment]) -> list[Moment]:
    """Of reports that came together the last one counts: the others are older than they look."""
    late = {round(moment.clock, 1): moment for moment in moments if moment.clock - moments[0].clock > WARM_UP_SECONDS}
    return list(late.values())


def tree_cpu_seconds(root: psutil.Process) -> float:
    """Of the process and all it started that still run."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


@own_arithmetic()
def bare(options: argparse.Namespace) -> None:
    """Under torchrun: rank 0 prints the moments, the CPU time being that of both processes and their launcher."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, job = torch.distributed.get_rank(), settings(options)
    scorer = make_scorer(job, shape=open_data(options.data).manifest.shape)
    optimizer = make_optimizer(job.optimizer, scorer)
    model: torch.nn.Module = scorer
    if options.workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(scorer, gradient_as_bucket_view=True, static_graph=True)
    pictures, order = torch.from_numpy(all_images(options.data)), np.random.default_rng(rank)
    moments, began, until = [], time.perf_counter(), WARM_UP_SECONDS + options.seconds
    for step in count(1):
        ids = np.sort(order.integers(len(pictures), size=BATCH))
        train_step(
            model, optimizer, pictures[ids], ids, job=job, pixels=scorer.pixels, epoch=0, beta=1.0,
            learning_rate=job.optimizer.learning_rate, weight=1 / BATCH,
        )  # fmt: skip
        if step % 50 == 0:
            if rank == 0:
                launcher = psutil.Process().parent()
                moments.append(Moment(step * BATCH * options.workers, time.perf_counter(), tree_cpu_seconds(launcher)))
            over = torch.tensor(time.perf_counter() - began > until)
            torch.distributed.broadcast(over, src=0)
            if over:
                break
    if rank == 0:
        print(json.dumps(steady(moments)))
    leave()


def reports(options: argparse.Namespace) -> None:
    """What Worker.report takes, ten times a second, of which about one is sent."""
    import ray
    from ray.train.torch import TorchTrainer

    from vaejob.cluster.board import Board
    from vaejob.cluster.join import cluster_of

    with cluster_of(settings(options).cluster), tempfile.TemporaryDirectory() as scratch:
        board = ray.remote(num_cpus=0)(Board).remote()
        told = TorchTrainer(
            time_reports,
            train_loop_config={"board": board, "folder": scratch},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(storage_path=scratch),
        )
        told.fit()
        seconds = [one for rank in range(2) for one in json.loads(Path(f"{scratch}/{rank}.json").read_text())]
    print(
        f"{1e3 * statistics.fmean(seconds):.2f} ms a call on average, median {1e3 * statistics.median(seconds):.2f}, "
        f"longest {1e3 * max(seconds):.1f}, over {len(seconds)} calls of 2 workers"
    )


def time_reports(config: dict[str, object]) -> None:
    from vaejob.cluster.worker import RayWorker

    worker, seconds = RayWorker(config["board"]), []
    for number in range(100):
        time.sleep(0.1)
        torch.distributed.barrier()  # the waiting for one another is the step's
        report = Report(
            images_seen=number, attempt="a", attempt_started_at_images=0, rank=worker.rank, world_size=worker.world_size
        )
        began = time.perf_counter()
        worker.report(report)
        seconds.append(time.perf_counter() - began)
    Path(f"{config['folder']}/{worker.rank}.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
