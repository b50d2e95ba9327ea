"""How soon a job trains again after SIGKILL of one of its workers, beside a bare Ray Train job of as many workers.

    python tests/benchmarks/restart.py [--rounds 5] [--kills 3] [--workers 2]

In turns, each in a process and on a Ray cluster of its own on this machine: our job on scikit-learn's digits, which reads its
state and its place among the images back, and a TorchTrainer whose function wraps a small model in DDP and steps, with Ray's
own way of starting workers again and nothing to restore. A worker is killed so many times in each turn; seconds are until a
step is done by workers that were not there before. A ratio is of the medians of two turns that follow one another. Beside
them stand the CPU seconds that a new worker has used by then (imports, restoring, the first batch), which a machine that is
busy with other things changes less.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.job.conftest import DIGITS_JOB, kill_tree, pack_digits
from tests.job.nodes import started

LONGEST_SECONDS = 900.0
GOAL = 1.3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--kills", type=int, default=3, help="in each turn")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.job:
        JOBS[options.job](options.folder, options.workers)
        return
    turns: dict[str, list[list[Restart]]] = {name: [] for name in JOBS}
    for number in range(options.rounds):
        for name in sorted(JOBS, reverse=number % 2 == 0):
            turns[name].append(one_turn(name, kills=options.kills, workers=options.workers))
            print(f"{name}: {turns[name][-1]}", file=sys.stderr, flush=True)
    for field in Restart._fields:
        medians = {}
        for name, of_rounds in turns.items():
            values = [[getattr(restart, field) for restart in turn] for turn in of_rounds]
            medians[name] = [statistics.median(turn) for turn in values]
            print(f"{field}, {name}: {spread([each for turn in values for each in turn])}")
        ratios = [one / other for one, other in zip(medians["ours"], medians["bare"], strict=True)]
        print(f"{field}, ours / bare: {spread(ratios)}, goal <= {GOAL}")


class Restart(NamedTuple):
    seconds: float
    """From the kill to the next step."""
    cpu_seconds: float
    """Of one new worker, until then."""


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def one_turn(name: str, *, kills: int, workers: int) -> list[Restart]:
    """What came of each kill."""
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        command = [sys.executable, __file__, f"--job={name}", f"--folder={folder}", f"--workers={workers}"]
        # Ray's processes would wait for all others of a busy machine.
        env = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
        log = Path(folder, "log")
        with log.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        found = []
        try:
            wait_for_step(Path(folder), process, known=set())
            for _ in range(kills):
                time.sleep(random.uniform(3, 5))
                known = set(steps(Path(folder)))
                children = psutil.Process(process.pid).children(recursive=True)
                victims = [child for child in children if "RayTrainWorker" in child.name()]
                killed_at = time.time()
                random.choice(victims).kill()
                at, cpu_seconds = wait_for_step(Path(folder), process, known=known)
                found.append(Restart(at - killed_at, cpu_seconds))
        finally:
            kill_tree(process.pid)
            process.wait()
    return found


def wait_for_step(folder: Path, process: subprocess.Popen[bytes], *, known: set[int]) -> tuple[float, float]:
    """When a worker that is not known had done its first step, and the CPU seconds that it had used."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while True:
        if new := [step for pid, step in steps(folder).items() if pid not in known]:
            return min(new)
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text()[-2000:])
        time.sleep(0.02)


def steps(folder: Path) -> dict[int, tuple[float, float]]:
    """By process, when it had done its first step, and its CPU seconds by then."""
    found = {}
    for path in folder.glob("step-*"):
        at, _, cpu_seconds = path.read_text().partition(" ")
        if cpu_seconds:
            found[int(path.name.removeprefix("step-"))] = (float(at), float(cpu_seconds))
    return found


def note_step(folder: Path) -> None:
    path = folder / f"step-{os.getpid()}"
    if not path.exists():
        path.write_text(f"{time.time()} {time.process_time()}")


def ours(folder: Path, workers: int) -> None:
    import vaejob.cluster.driver as driver
    from vaejob.config import parse_config
    from vaejob.run import begin

    digits = pack_digits(f"{folder}/digits")
    settings = [
        f"cluster.workers={workers}",
        "training.images=1000000000",
        "training.report_every_images=640",
        "cluster.max_failures=1000",
    ]
    job = parse_config(DIGITS_JOB.format(bucket=folder / "runs", digits=digits), settings)

    train_worker = driver.train_worker

    def noted(settings: dict[str, Any]) -> None:
        from vaejob.training import loop

        moved = loop.moved

        def moved_and_noted(images_seen: int) -> None:
            note_step(folder)
            moved(images_seen)

        loop.moved = moved_and_noted
        train_worker(settings)

    driver.train_worker = noted
    token = begin(job)
    assert token
    driver.train_on_cluster(job, on_event=lambda event: print(event.body.get("text", ""), flush=True), token=token)


def bare(folder: Path, workers: int) -> None:
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    def train(settings: dict[str, Any]) -> None:
        import torch
        from ray.train.torch import prepare_model

        model = prepare_model(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)))
        optimizer = torch.optim.Adam(model.parameters())
        while True:
            images = torch.rand(64 // workers, 64)
            optimizer.zero_grad()
            (model(images) - images).square().mean().backward()
            optimizer.step()
            note_step(folder)

    started(lambda: ray.init(address="local", include_dashboard=False, log_to_driver=False))
    TorchTrainer(
        train,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="bare", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


JOBS = {"ours": ours, "bare": bare}

if __name__ == "__main__":
    main()
