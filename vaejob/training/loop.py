"""The training loop of one rank, top to bottom."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from vaejob.config import JobConfig
from vaejob.data.ahead import in_background
from vaejob.data.batches import Batch, DataSet
from vaejob.data.order import ids_digest
from vaejob.errors import ConfigError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.storage.retry import retries_so_far
from vaejob.training.checkpoint import StateWriter, state_tensors
from vaejob.training.evaluate import evaluate
from vaejob.training.schedule import beta, due, learning_rate
from vaejob.training.step import StepTerms, train_step
from vaejob.training.worker import Report, Worker

Item = TypeVar("Item")


@dataclass
class TrainState:
    """What a checkpoint holds and a resumed job puts back."""

    scorer: NegativeELBO
    optimizer: torch.optim.Optimizer
    images_seen: int


def train(
    job: JobConfig,
    worker: Worker,
    state: TrainState,
    *,
    batches: Iterable[Batch],
    images_per_epoch: int,
    dims_per_image: int,
    held_out: DataSet | None,
    writer: StateWriter,
    attempt: str,
    notes: tuple[str, ...] = (),
    retries_before: Counter[str],
) -> None:
    """Trains until job.training.images are seen or the job is asked to stop; either way a checkpoint is the end."""
    model = _distributed(state.scorer, worker)
    window = Window(
        worker,
        attempt,
        started_at_images=state.images_seen,
        dims_per_image=dims_per_image,
        notes=notes,
        retries_before=retries_before,
    )
    for batch, images in window.timed(_pinned(batches, worker.device)):
        before = state.images_seen
        state.images_seen = batch.place.epoch * images_per_epoch + batch.place.stop
        rate = learning_rate(job.optimizer, images_seen=before, images=job.training.images)
        terms = train_step(
            model,
            state.optimizer,
            images.to(worker.device, non_blocking=True),
            batch.ids,
            job=job,
            pixels=state.scorer.pixels,
            epoch=batch.place.epoch,
            beta=beta(job.objective, images_seen=before),
            learning_rate=rate,
            weight=worker.world_size / batch.place.images,
        )
        window.add(terms, batch)  # stays on the device
        now = due(job, before=before, after=state.images_seen)
        if not now.report:
            continue

        report = window.report(state.images_seen, learning_rate=rate)
        _refuse_divergence(report)
        stop = worker.should_stop()
        if now.save or stop:
            writer.save(state.images_seen, state_tensors(state.scorer, state.optimizer))
        if now.evaluate and held_out is not None:
            report = replace(report, held_out=_held_out(job, worker, state, held_out))
        worker.report(replace(report, saved=writer.saved()))
        window.restart()
        if stop:
            break

    writer.finish()
    worker.report(replace(window.report(state.images_seen), saved=writer.saved(), last=True))


class Window:
    """What a rank has summed up since its last report; retries count from before the first batch was asked for."""

    def __init__(
        self,
        worker: Worker,
        attempt: str,
        *,
        started_at_images: int,
        dims_per_image: int,
        notes: Iterable[str],
        retries_before: Counter[str],
    ) -> None:
        self._worker, self._attempt, self._started_at_images = worker, attempt, started_at_images
        self._totals = RunningTotals(dims_per_image=dims_per_image, device=worker.device)
        self._objective_nats = torch.zeros((), dtype=torch.float64, device=worker.device)
        self._notes = list(notes)
        self._told = set[str]()
        self._retries = retries_before
        self.restart()

    def restart(self) -> None:
        self._totals.clear()
        self._objective_nats.zero_()
        self._ids_digest = 0
        self._missing_images = 0
        self._began = time.perf_counter()
        self._waited_seconds = 0.0

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, while the time that the step waits for them is counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self._waited_seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, terms: StepTerms, batch: Batch) -> None:
        """Without waiting for the device."""
        self._totals.add(terms.bound)
        self._objective_nats += terms.objective_nats
        self._ids_digest += ids_digest(batch.ids, epoch=batch.place.epoch)
        self._missing_images += batch.missing
        self._notes += [note for note in batch.notes if note not in self._told]
        self._told.update(batch.notes)

    def report(self, images_seen: int, *, learning_rate: float = 0.0) -> Report:
        """The sums so far, and the notes since the last report; waits for the device."""
        notes, self._notes = self._notes, []
        retries = retries_so_far()
        new_retries, self._retries = retries - self._retries, retries
        return Report(
            images_seen=images_seen,
            attempt=self._attempt,
            attempt_started_at_images=self._started_at_images,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            train=self._totals.to_host(),
            objective_nats=float(self._objective_nats),
            ids_digest=self._ids_digest % 2**64,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - self._began,
            data_wait_seconds=self._waited_seconds,
            missing_images=self._missing_images,
            retries=dict(new_retries),
            notes=tuple(notes),
        )


def _distributed(scorer: NegativeELBO, worker: Worker) -> nn.Module:
    if worker.world_size == 1:
        return scorer
    devices = [worker.device] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        scorer, device_ids=devices, gradient_as_bucket_view=True, static_graph=True
    )


def _held_out(job: JobConfig, worker: Worker, state: TrainState, data: DataSet) -> LikelihoodTotals:
    return evaluate(
        state.scorer,
        data.evaluation_blocks(rank=worker.rank, world_size=worker.world_size),
        dims_per_image=data.manifest.dims,
        config=job.likelihood,
        device=worker.device,
        samples=job.training.evaluate_samples,
    )


def _pinned(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its images, uint8 [b, C, H, W]; for a GPU, in memory that it reads while the step before goes on."""
    tensors = ((batch, torch.from_numpy(batch.images)) for batch in batches)
    if device.type != "cuda":
        return tensors
    return in_background(((batch, images.pin_memory()) for batch, images in tensors), depth=1)


def _refuse_divergence(report: Report) -> None:
    if report.train.non_finite:
        raise ConfigError(
            f"the bound of {report.train.non_finite} images is not finite at {report.images_seen} images seen; start a "
            "new run with a lower optimizer.learning_rate, or with optimizer.warmup_images or optimizer.clip set"
        )
