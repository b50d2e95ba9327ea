"""The training loop of one rank, top to bottom."""

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from vaejob.config import JobConfig
from vaejob.data.batches import Batch, DataSet
from vaejob.data.order import ids_digest
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.storage.retry import retries_so_far
from vaejob.training.checkpoint import StateWriter, TrainState
from vaejob.training.evaluate import evaluate
from vaejob.training.passes import CompiledPasses, as_trained
from vaejob.training.profile import Profile, stage
from vaejob.training.schedule import average_share, beta, due, learning_rate
from vaejob.training.stability import diverged, refuse_to_go_on, replica_checksum
from vaejob.training.step import StepTerms, move_average, train_step
from vaejob.training.worker import Report, Worker, moved, take_waited

Item = TypeVar("Item")


def train(
    job: JobConfig,
    worker: Worker,
    state: TrainState,
    *,
    batches: Iterable[tuple[Batch, Tensor]],
    images_per_epoch: int,
    dims_per_image: int,
    held_out: DataSet | None,
    writer: StateWriter,
    attempt: str,
    notes: tuple[str, ...] = (),
    retries_before: Counter[str],
    profile: Profile | None = None,
) -> None:
    """Trains until job.training.images are seen or the job is asked to stop; either way a checkpoint is the end.

    Raises Diverged where training cannot go on from here, ConfigError where it has gone back often enough.
    """
    model = _trained(state.scorer, worker, job)
    window = Window(
        job, worker, state, attempt, dims_per_image=dims_per_image, notes=notes, retries_before=retries_before
    )
    for batch, images in window.timed(batches):
        before = state.images_seen
        state.images_seen = batch.place.epoch * images_per_epoch + batch.place.stop
        rate = state.guard.rate_factor * learning_rate(job.optimizer, images_seen=before, images=job.training.images)
        terms = _step(job, worker, state, model, batch, images, before=before, learning_rate=rate)
        with stage("totals"):
            window.add(terms, batch)  # stays on the device
        moved(state.images_seen)
        with stage("communication"):
            now, stop = due(job, before=before, after=state.images_seen), worker.should_stop()
        if not now.report and not stop:
            continue

        with stage("report"):
            report = window.report(learning_rate=rate)
        finished = state.images_seen >= job.training.images
        if diverged(report, last=finished):
            writer.finish()
            worker.report(_with_saved(report, writer))
            refuse_to_go_on(report)
        if stop or finished or (now.save and not report.non_finite_in_a_row):  # nobody wants to go back to the brink
            with stage("checkpoint"):
                writer.save(state.images_seen, state.tensors())
        if now.evaluate and held_out is not None:
            with stage("held-out"):
                report = replace(report, held_out=_held_out(job, worker, state, held_out))
        with stage("report"):
            worker.report(_with_saved(report, writer))
            window.restart()
        if stop:
            break

    with stage("checkpoint"):
        writer.finish()
    report = _with_saved(window.report(), writer)
    found = profile.finish() if profile else ()
    worker.report(replace(report, last=True, notes=(*report.notes, *found)))


def _with_saved(report: Report, writer: StateWriter) -> Report:
    """With the states that are in the bucket since the report before, and those that were given up."""
    return replace(report, saved=writer.saved(), notes=(*report.notes, *writer.notes()))


class Window:
    """What a rank has summed up since its last report; retries count from before the first batch was asked for."""

    def __init__(
        self,
        job: JobConfig,
        worker: Worker,
        state: TrainState,
        attempt: str,
        *,
        dims_per_image: int,
        notes: Iterable[str],
        retries_before: Counter[str],
    ) -> None:
        self._worker, self._state, self._attempt = worker, state, attempt
        self._started_at_images = state.images_seen
        self._totals = RunningTotals(dims_per_image=dims_per_image, device=worker.device)
        self._objective_nats = torch.zeros((), dtype=torch.float64, device=worker.device)
        self._notes = list(notes)
        self._told = set[str]()
        self._retries = retries_before
        self._to_be_compiled = job.training.compile
        self.restart()

    def restart(self) -> None:
        self._totals.clear()
        self._objective_nats.zero_()
        self._state.guard.restart()
        self._ids_digest = 0
        self._missing_images = 0
        self._began = time.perf_counter()
        self._waited_seconds = 0.0

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, while the time that the step waits for them is counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            with stage("data wait"):
                batch = next(source, None)
            self._got_batch = time.perf_counter()
            self._waited_seconds += self._got_batch - asked
            if batch is None:
                return
            yield batch

    def add(self, terms: StepTerms, batch: Batch) -> None:
        """Without waiting for the device."""
        if self._to_be_compiled and self._worker.rank == 0:
            self._notes.append(
                f"compiled the model in {time.perf_counter() - self._got_batch:.1f} s, during the first step"
            )
        self._to_be_compiled = False
        self._totals.add(terms.bound)
        self._objective_nats += terms.objective_nats
        self._ids_digest += ids_digest(batch.ids, epoch=batch.place.epoch)
        self._missing_images += batch.missing
        self._notes += [note for note in batch.notes if note not in self._told]
        self._told.update(batch.notes)

    def report(self, *, learning_rate: float = 0.0) -> Report:
        """The sums so far, and the notes since the last report; waits for the device."""
        notes, self._notes = [*self._notes, *take_waited()], []
        state, counts = self._state, self._state.guard.counts()
        retries = retries_so_far()
        new_retries, self._retries = retries - self._retries, retries
        return Report(
            images_seen=state.images_seen,
            attempt=self._attempt,
            attempt_started_at_images=self._started_at_images,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            train=self._totals.to_host(),
            objective_nats=float(self._objective_nats),
            ids_digest=self._ids_digest % 2**64,
            learning_rate=learning_rate,
            halvings=state.guard.halvings,
            steps=counts.steps,
            skipped_steps=counts.skipped,
            non_finite_steps=counts.non_finite,
            non_finite_in_a_row=counts.non_finite_in_a_row,
            gradient_norms=counts.norms,
            replica_checksum=replica_checksum(state.scorer.parameters()),
            seconds=time.perf_counter() - self._began,
            data_wait_seconds=self._waited_seconds,
            missing_images=self._missing_images,
            retries=dict(new_retries),
            notes=tuple(notes),
        )


def _step(
    job: JobConfig,
    worker: Worker,
    state: TrainState,
    model: nn.Module | CompiledPasses,
    batch: Batch,
    images: Tensor,
    *,
    before: int,
    learning_rate: float,
) -> StepTerms:
    """One batch: the weights move, and the averaged ones follow them."""
    with stage("copy"):
        images = images.to(worker.device, non_blocking=True)
    terms = train_step(
        model,
        state.optimizer,
        images,
        batch.ids,
        job=job,
        pixels=state.scorer.pixels,
        epoch=batch.place.epoch,
        beta=beta(job.objective, images_seen=before),
        learning_rate=learning_rate,
        weight=worker.world_size / batch.place.images,
        guard=state.guard,
    )
    if state.averaged is not None:
        share = average_share(job.optimizer, before=before, after=state.images_seen)
        with stage("average"):
            move_average(state.averaged, state.scorer, share=share, skipped=terms.skipped)
    return terms


def _trained(scorer: NegativeELBO, worker: Worker, job: JobConfig) -> nn.Module | CompiledPasses:
    """What the step calls, with the gradients of all ranks averaged if there are several."""
    model = as_trained(scorer, job, world_size=worker.world_size)
    if worker.world_size == 1:
        return model
    assert isinstance(model, nn.Module), model
    devices = [worker.device] if worker.device.type == "cuda" else None
    # Of a 1x1 convolution's weights, in whose dimensions of size 1 any stride means the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Of a static graph DDP learns in the first backward pass, and sums the gradients after it, in the midst of the pieces.
    static = not job.training.micro_batch
    return nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, static_graph=static
    )


def _held_out(job: JobConfig, worker: Worker, state: TrainState, data: DataSet) -> LikelihoodTotals:
    with closing(data.evaluation_blocks(rank=worker.rank, world_size=worker.world_size)) as blocks:
        return evaluate(
            state.best,
            _moving(blocks, state.images_seen),
            dims_per_image=data.manifest.dims,
            config=job.likelihood,
            device=worker.device,
            samples=job.training.evaluate_samples,
        )


def _moving(blocks: Iterable[Item], images_seen: int) -> Iterator[Item]:
    for block in blocks:
        yield block
        moved(images_seen)
