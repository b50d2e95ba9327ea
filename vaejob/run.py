"""Assembles one job in one process: configuration, data, model, loop; also what a driver checks before workers start."""

import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaejob.config import JobConfig, changed_results, parse_config
from vaejob.data.batches import DataSet, open_data
from vaejob.errors import CheckpointError, ConfigError, DataError, ObjectMissing, RunError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.likelihood.pixels import check_total_mass
from vaejob.storage import Bucket, absolute, join, open_bucket, split_address
from vaejob.storage.retry import retries_so_far
from vaejob.storage.runs import (
    JOB_KEY,
    Record,
    begin_attempt,
    new_attempt,
    newest_record,
    read_job,
    read_record,
    recorded_images,
)
from vaejob.training.checkpoint import StateWriter, load_state, read_state
from vaejob.training.ledger import Ledger
from vaejob.training.loop import TrainState, train
from vaejob.training.step import draw_levels, evaluation_noise, make_optimizer, make_scorer
from vaejob.training.worker import Event, Report, Told, Worker


class Inputs(NamedTuple):
    """What a job reads and writes."""

    run: Bucket
    train: DataSet
    test: DataSet | None


def recipes() -> list[str]:
    """Names of the jobs that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files("vaejob.recipes").iterdir()
                  if path.name.endswith(".yaml"))  # fmt: skip


def load_config(address: str, overrides: tuple[str, ...] = ()) -> JobConfig:
    """The job at an address: a file, s3://.../job.yaml, or a recipe's name. Raises ConfigError, or what a bucket raises."""
    if address in recipes() and not Path(address).exists():
        text = resources.files("vaejob.recipes").joinpath(f"{address}.yaml").read_text()
    else:
        folder, name = split_address(address)
        try:
            text = open_bucket(folder).read(name).decode()
        except (ObjectMissing, UnicodeDecodeError):
            raise ConfigError(
                f"{address} is neither a configuration file nor a recipe ({', '.join(recipes())})"
            ) from None
    job = parse_config(text, overrides, source=address)
    # The addresses are kept as they read from any working directory: of a worker, or of a later resume.
    run = job.run.model_copy(update={"bucket": absolute(job.run.bucket)})
    data = job.data.model_copy(
        update={"train": absolute(job.data.train), "test": absolute(job.data.test) if job.data.test else None}
    )
    return job.model_copy(update={"run": run, "data": data})


def run_address(job: JobConfig) -> str:
    return join(job.run.bucket, job.run.name)


def open_inputs(job: JobConfig) -> Inputs:
    test = open_data(job.data.test) if job.data.test else None
    inputs = Inputs(open_bucket(run_address(job)), open_data(job.data.train), test)
    if test and test.manifest.shape != inputs.train.manifest.shape:
        raise DataError(
            f"data.test has images of {_by(test.manifest.shape)}, data.train of {_by(inputs.train.manifest.shape)}; "
            "they must have one shape"
        )
    return inputs


def begin(job: JobConfig) -> bool:
    """Checks everything that can be checked before workers start, and notes the attempt; False if nothing is left to do.

    Raises, in one line: ConfigError, DataError, RunError for a name that belongs to another configuration or other
    data, BucketError for a bucket that does not exist or may not be written.
    """
    inputs = open_inputs(job)
    check_total_mass(make_scorer(job, shape=inputs.train.manifest.shape).pixels)
    if inputs.run.size(JOB_KEY) is not None:
        if changes := changed_results(read_job(inputs.run), job):
            raise RunError(
                f"{inputs.run.url} belongs to a run with other settings ({'; '.join(changes)}): "
                "set them back to continue it, or choose another run.name"
            )
        _refuse_other_data(inputs)
    record, _ = newest_record(inputs.run)
    if record and record.images_seen >= job.training.images:
        return False
    begin_attempt(inputs.run, job, who=f"{datetime.now(UTC).isoformat()} pid {os.getpid()} on {platform.node()}")
    return True


def make_ledger(job: JobConfig, inputs: Inputs, *, on_event: Callable[[Event], None]) -> Ledger:
    return Ledger(
        inputs.run,
        job,
        train_fingerprint=inputs.train.manifest.fingerprint,
        test_fingerprint=inputs.test.manifest.fingerprint if inputs.test else None,
        test_images=inputs.test.manifest.images if inputs.test else None,
        shape=inputs.train.manifest.shape,
        on_event=on_event,
    )


def work(job: JobConfig, worker: Worker) -> None:
    """One rank of the job, from the newest good checkpoint to the end."""
    retries_before = retries_so_far()
    if worker.device.type == "cpu":
        torch.set_num_threads(job.cluster.cpus_per_worker)
    inputs = open_inputs(job)
    scorer = make_scorer(job, shape=inputs.train.manifest.shape)

    # Rank 0 decides where to go on from, having read that state in full; the others are told.
    chosen: tuple[int, list[str]] | None = None
    tensors: dict[str, Tensor] | None = None
    if worker.rank == 0:
        record, tensors, damage = restorable(inputs.run)
        chosen = (record.images_seen if record else 0, damage)
    attempt = worker.told_by_first(new_attempt())
    images_seen, damage = worker.told_by_first(chosen) or (0, [])
    if images_seen and tensors is None:
        tensors = read_state(inputs.run, read_record(inputs.run, images_seen))
    if tensors is None:
        _start_at_the_mean(scorer, inputs.train, job)
    scorer.to(worker.device)
    optimizer = make_optimizer(job.optimizer, scorer)
    if tensors is not None:
        load_state(tensors, scorer, optimizer)

    train(
        job,
        worker,
        TrainState(scorer, optimizer, images_seen),
        batches=inputs.train.training_batches(
            job.data,
            seed=job.run.seed,
            images_seen=images_seen,
            until=job.training.images,
            rank=worker.rank,
            world_size=worker.world_size,
        ),
        images_per_epoch=inputs.train.manifest.images,
        dims_per_image=inputs.train.manifest.dims,
        held_out=inputs.test,
        writer=StateWriter(inputs.run, attempt=attempt, rank=worker.rank, world_size=worker.world_size),
        attempt=attempt,
        notes=tuple(damage),
        retries_before=retries_before,
    )


def restorable(run: Bucket) -> tuple[Record | None, dict[str, Tensor] | None, list[str]]:
    """The newest record whose state reads back whole, that state, and a line for each newer one that does not.

    Raises CheckpointError if there are records and none can be restored: starting over would hide the loss.
    """
    damage: list[str] = []
    for images_seen in reversed(recorded_images(run)):
        try:
            record = read_record(run, images_seen)
            return record, read_state(run, record), damage
        except CheckpointError as error:
            damage.append(f"passed over the checkpoint at {images_seen} images: {error}")
    if damage:
        raise CheckpointError(f"{run.url}: none of {len(damage)} checkpoints can be restored; the newest: {damage[0]}")
    return None, None, []


class ThisProcess:
    """The only worker of a job without a cluster; its reports go straight to the ledger."""

    def __init__(self, ledger: Ledger, *, device: torch.device, should_stop: Callable[[], bool]) -> None:
        self.rank, self.world_size, self.device = 0, 1, device
        self._ledger = ledger
        self.should_stop = should_stop

    def report(self, report: Report) -> None:
        self._ledger.add([[report]])

    def told_by_first(self, value: Told) -> Told:
        return value


def train_here(job: JobConfig, *, on_event: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
    """Runs the whole job, which has begun, in this process without Ray."""
    inputs = open_inputs(job)
    device = torch.device("cuda" if job.cluster.gpus_per_worker else "cpu")
    ledger = make_ledger(job, inputs, on_event=on_event)
    work(job, ThisProcess(ledger, device=device, should_stop=should_stop))


MEAN_IMAGES = 4096


def _start_at_the_mean(scorer: NegativeELBO, data: DataSet, job: JobConfig) -> None:
    """The decoder starts at the mean picture (Burda et al., 2016), taken over images from all over the data set."""
    blocks = np.linspace(0, data.manifest.images - 256, num=MEAN_IMAGES // 256).clip(min=0).astype(np.int64)
    ids = np.unique(blocks[:, None] + np.arange(256))
    ids, images = data.found(ids[ids < data.manifest.images], skip_damaged=job.data.on_corrupt == "skip")
    levels = draw_levels(
        torch.from_numpy(images),
        ids,
        pixels=scorer.pixels,
        config=job.likelihood,
        noise=evaluation_noise(ids, device=torch.device("cpu")),
    )
    scorer.vae.set_output_bias(scorer.pixels.initial_parameters(levels.float().mean(0)))


def _refuse_other_data(inputs: Inputs) -> None:
    record, _ = newest_record(inputs.run)
    if record is None:
        return
    now = {"train": inputs.train.manifest.fingerprint, "test": inputs.test and inputs.test.manifest.fingerprint}
    for name, then in (("train", record.train_fingerprint), ("test", record.test_fingerprint)):
        if then != now[name]:
            raise RunError(
                f"{inputs.run.url} belongs to a run on other images: the fingerprint of data.{name} was "
                f"{str(then)[:12]}, now it is {str(now[name])[:12]}; choose another run.name, or the data it was started on"
            )


def _by(shape: tuple[int, int, int]) -> str:
    return "x".join(str(size) for size in shape)
