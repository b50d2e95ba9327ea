"""Assembles one job in one process: configuration, data, model, loop; also what a driver checks before workers start."""

import os
import platform
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaejob.config import JobConfig, changed_results
from vaejob.data.batches import DataSet, open_data
from vaejob.errors import CheckpointError, DataError, RunError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.likelihood.pixels import check_total_mass
from vaejob.storage import Bucket, join, open_bucket
from vaejob.storage.fence import Token, newest_token
from vaejob.storage.patience import Patience
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
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.beside import LedgerBeside
from vaejob.training.checkpoint import StateWriter, TrainState, read_state, state_of_first
from vaejob.training.heap import freed_memory_kept
from vaejob.training.ledger import Ledger
from vaejob.training.loop import train
from vaejob.training.profile import profiled
from vaejob.training.resident import batches_on_device
from vaejob.training.stability import Diverged
from vaejob.training.step import draw_levels, evaluation_noise, make_scorer
from vaejob.training.worker import Event, Report, Told, Worker, patience_with_images, reading


class Inputs(NamedTuple):
    """What a job reads and writes."""

    run: Bucket
    train: DataSet
    test: DataSet | None

    def of_worker(self, patience: Patience, *, processes_here: int) -> "Inputs":
        """The same, with images that are waited for, and decoded by so many processes of this machine."""

        def read(data: DataSet) -> DataSet:
            return replace(data, patience=patience, processes_here=processes_here)

        return self._replace(train=read(self.train), test=read(self.test) if self.test else None)


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


def begin(job: JobConfig) -> Token | None:
    """Checks everything that can be checked before workers start, and notes the start; None if nothing is left to do.

    With its token the job may write to the run, until it is started again.

    Raises, in one line: ConfigError, DataError, RunError for a name that belongs to another configuration or other
    data, BucketError for a bucket that does not exist or may not be written.
    """
    inputs = open_inputs(job)
    manifest = inputs.train.manifest
    check_total_mass(make_scorer(job, shape=manifest.shape, images=manifest.images).pixels)
    if inputs.run.size(JOB_KEY) is not None:
        if changes := changed_results(read_job(inputs.run), job):
            raise RunError(
                f"{inputs.run.url} belongs to a run with other settings ({'; '.join(changes)}): "
                "set them back to continue it, or choose another run.name"
            )
        _refuse_other_data(inputs)
    record, _ = newest_record(inputs.run)
    if record and record.images_seen >= job.training.images:
        return None
    inputs.run.remove_leftovers()
    who = f"{datetime.now(UTC).isoformat(timespec='seconds')} pid {os.getpid()} on {platform.node()}"
    return begin_attempt(inputs.run, job, who=who)


def make_ledger(
    job: JobConfig, inputs: Inputs, *, on_event: Callable[[Event], None], token: Token | None = None
) -> Ledger:
    """token: what `begin` returned; without it, that of the newest start."""
    return Ledger(
        inputs.run,
        job,
        train_fingerprint=inputs.train.manifest.fingerprint,
        test_fingerprint=inputs.test.manifest.fingerprint if inputs.test else None,
        test_images=inputs.test.manifest.images if inputs.test else None,
        shape=inputs.train.manifest.shape,
        on_event=on_event,
        token=token or newest_token(inputs.run),
    )


class GoBack(NamedTuple):
    """What a job that diverged knows when it goes back."""

    attempt: str
    """The one that diverged."""
    started_at_images: int
    halvings: int
    """Of the learning rate, from now on."""
    why: str


@own_arithmetic()
def work(job: JobConfig, worker: Worker) -> None:
    """One rank of the job, from the newest good checkpoint to the end; a few times back to one where training diverges."""
    retries_before = retries_so_far()
    if worker.device.type == "cpu":
        torch.set_num_threads(job.cluster.cpus_per_worker)
    patience = patience_with_images(job.checkpoint.outage_seconds)
    inputs = open_inputs(job).of_worker(patience, processes_here=worker.processes_here)
    back: GoBack | None = None
    try:
        while True:
            attempt = worker.told_by_first(new_attempt())
            try:
                return _attempt(job, worker, inputs, attempt, back, retries_before=retries_before)
            except Diverged as diverged:
                back = GoBack(
                    attempt, diverged.report.attempt_started_at_images, diverged.report.halvings + 1, str(diverged)
                )
                retries_before = retries_so_far()
    finally:
        patience.end()  # no thread goes on waiting for images that nobody wants any more


def _attempt(
    job: JobConfig, worker: Worker, inputs: Inputs, attempt: str, back: GoBack | None, *, retries_before: Counter[str]
) -> None:
    state, notes = _restored(job, worker, inputs, back)
    writer = StateWriter(
        inputs.run,
        attempt=attempt,
        rank=worker.rank,
        world_size=worker.world_size,
        outage_seconds=job.checkpoint.outage_seconds,
    )
    source = batches_on_device(inputs.train, job, worker, images_seen=state.images_seen)
    with (
        freed_memory_kept(worker.device),
        closing(source) as batches,  # however it ends, no thread goes on reading
        profiled(job, worker, inputs.run, state.optimizer, attempt=attempt) as profile,
    ):
        train(
            job,
            worker,
            state,
            batches=batches,
            images_per_epoch=inputs.train.manifest.images,
            dims_per_image=inputs.train.manifest.dims,
            held_out=inputs.test,
            writer=writer,
            attempt=attempt,
            notes=notes,
            retries_before=retries_before,
            profile=profile,
        )


def _restored(
    job: JobConfig, worker: Worker, inputs: Inputs, back: GoBack | None
) -> tuple[TrainState, tuple[str, ...]]:
    """Where the rank goes on from, and what a person should be told about it."""
    manifest = inputs.train.manifest
    scorer = make_scorer(job, shape=manifest.shape, images=manifest.images)
    # Rank 0 decides where to go on from, having read that state in full; the others are sent it.
    chosen: tuple[int, list[str]] | None = None
    tensors: dict[str, Tensor] | None = None
    if worker.rank == 0:
        before = _no_longer_good(inputs.run, back) if back else None
        record, tensors, damage = restorable(inputs.run, before=before, on_progress=worker.reading)
        chosen = (record.images_seen if record else 0, damage)
    images_seen, damage = worker.told_by_first(chosen) or (0, [])
    tensors = state_of_first(tensors, worker)
    if tensors is None:
        _start_at_the_mean(scorer, inputs.train, job)
    state = TrainState.begin(job.optimizer, scorer.to(worker.device), device=worker.device)
    if tensors is not None:
        state.load(tensors, images_seen=images_seen)
    if back is None:
        return state, tuple(damage)
    state.guard.halvings = back.halvings
    there = f"the checkpoint at {images_seen} images" if tensors else "the initial weights"
    return state, (*damage, f"{back.why}: went back to {there}, the learning rate times {state.guard.rate_factor:g}")


def _no_longer_good(run: Bucket, back: GoBack) -> int | None:
    """The checkpoint that an attempt began at, if it came to no other before it diverged: one before it is to be tried."""
    newest, _ = newest_record(run)
    return None if newest and newest.attempt == back.attempt else back.started_at_images


def restorable(
    run: Bucket, *, before: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Record | None, dict[str, Tensor] | None, list[str]]:
    """The newest record whose state reads back whole, that state, and a line for each newer one that does not.

    before: of those of fewer images. on_progress: as read_state's. Raises CheckpointError if there are records and none can be restored: starting over
    would hide the loss.
    """
    damage: list[str] = []
    for images_seen in reversed(recorded_images(run)):
        if before is not None and images_seen >= before:
            continue
        try:
            record = read_record(run, images_seen)
            return record, read_state(run, record, on_progress=on_progress), damage
        except RunError:
            continue  # an earlier start that still lived has tidied it away since it was listed
        except CheckpointError as error:
            damage.append(f"passed over the checkpoint at {images_seen} images: {error}")
    if damage:
        raise CheckpointError(f"{run.url}: none of {len(damage)} checkpoints can be restored; the newest: {damage[0]}")
    return None, None, []


class ThisProcess:
    """The only worker of a job without a cluster; its reports go straight to the ledger."""

    def __init__(
        self,
        ledger: LedgerBeside,
        *,
        device: torch.device,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.rank, self.world_size, self.processes_here, self.device = 0, 1, 1, device
        self._ledger = ledger
        self._on_event = on_event
        self.should_stop = should_stop

    def report(self, report: Report) -> None:
        self._ledger.add([[report]])
        if report.last:
            self._ledger.wait()

    def reading(self, done: int, total: int) -> None:
        self._on_event(reading(done, total))

    def told_by_first(self, value: Told) -> Told:
        self._ledger.wait()  # an attempt looks in the bucket for what the one before has left
        return value


def train_here(
    job: JobConfig,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    token: Token,
) -> None:
    """Runs the whole job, which has begun, in this process without Ray; events are told on threads of their own.

    token: what `begin` returned.
    """
    inputs = open_inputs(job)
    device = torch.device("cuda" if job.cluster.gpus_per_worker else "cpu")
    ledger = LedgerBeside(make_ledger(job, inputs, on_event=on_event, token=token))
    try:
        work(job, ThisProcess(ledger, device=device, on_event=on_event, should_stop=should_stop))
    finally:
        ledger.wait()


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
