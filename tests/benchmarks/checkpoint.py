"""What a checkpoint costs the training beside it: a state of 500 MB, to a real S3 server on this machine, once a minute.

    python tests/benchmarks/checkpoint.py [--rounds 3] [--seconds 60]

In turns, so many seconds each: training alone, and training that saves a state at the beginning. The stall is how long
`StateWriter.save` keeps the training thread (it copies the state off the device); what the whole checkpoint costs is the steps
that were not taken in its turn, with hashing, upload and the server itself on the same cores as training. Between turns the
same state is saved while nothing else runs, to the last byte: the time of a save that training would wait for.
"""

import argparse
import secrets
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from sys import path

import numpy as np
import torch

path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.s3.server import client, running, which_server
from vaejob.storage import open_bucket
from vaejob.training.checkpoint import StateWriter, TrainState
from vaejob.training.step import make_scorer, train_step

BATCH = 100
JOB = vaejob.load_config(
    "mnist-iwae-1", "data.train=nowhere", "run.bucket=nowhere", "model.hidden=[4096,4096]", "model.latent=50"
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=60.0)
    options = arguments.parse_args()
    kind = which_server()
    assert kind, "no S3 server is installed"
    state = TrainState.begin(JOB.optimizer, make_scorer(JOB, shape=(1, 28, 28)))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, 1, 28, 28), dtype=np.uint8))
    train(state, images, seconds=5)
    megabytes = sum(tensor.nbytes for tensor in state.tensors().values()) / 1e6
    stalls, whole, alone, beside = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, running(kind, Path(folder) / "s3") as server, server.as_environment():
        client(server).create_bucket(Bucket="checkpoints")
        bucket = open_bucket("s3://checkpoints")
        writer = StateWriter(bucket, attempt=secrets.token_hex(4), rank=0, world_size=1)
        save(writer, state)  # the first one asks the system for the memory of its copy
        wait_for(writer)
        for _ in range(options.rounds):
            alone.append(train(state, images, seconds=options.seconds))
            begun = time.perf_counter()
            save(writer, state)
            wait_for(writer)
            whole.append(time.perf_counter() - begun)
            stalls.append(save(writer, state))
            beside.append(train(state, images, seconds=options.seconds - stalls[-1]))
            wait_for(writer)
        writer.finish()
    print(
        f"state of {megabytes:.0f} MB, {kind}, {torch.get_num_threads()} threads, a step of {options.seconds / statistics.median(alone):.2f} s"
    )
    for name, values, unit in (
        ("a save that is waited for", whole, "s"),
        ("stall of training", stalls, "s"),
        ("stall / save", [stall / one for stall, one in zip(stalls, whole, strict=True)], ""),
        ("stall / training", [stall / options.seconds for stall in stalls], ""),
        ("steps not taken", [1 - with_it / without for with_it, without in zip(beside, alone, strict=True)], ""),
    ):
        print(f"{name:<26} {statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}] {unit}")


def save(writer: StateWriter, state: TrainState) -> float:
    """Seconds until training could go on."""
    begun = time.perf_counter()
    writer.save(1, state.tensors())
    return time.perf_counter() - begun


def wait_for(writer: StateWriter) -> None:
    """Until all of what was saved is in the bucket."""
    while not writer.saved():
        time.sleep(0.01)


def train(state: TrainState, images: torch.Tensor, *, seconds: float) -> float:
    """Steps that were taken, the last one in part."""
    ids, until = np.arange(BATCH), time.perf_counter() + seconds
    for steps in count():
        begun = time.perf_counter()
        train_step(
            state.scorer, state.optimizer, images, ids, job=JOB, pixels=state.scorer.pixels, epoch=steps, beta=1.0,
            learning_rate=1e-4, weight=1 / BATCH, guard=state.guard,
        )  # fmt: skip
        if (now := time.perf_counter()) >= until:
            return steps + (until - begun) / (now - begun)
    raise AssertionError


if __name__ == "__main__":
    main()
