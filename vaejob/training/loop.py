"""The training loop of one rank, top to bottom."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vaejob.config import JobConfig
from vaejob.data.batches import Batch, DataSet
from vaejob.data.order import ids_digest
from vaejob.errors import ConfigError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.training.checkpoint import StateWriter, state_tensors
from vaejob.training.evaluate import evaluate
from vaejob.training.schedule import beta, crosses, learning_rate
from vaejob.training.step import train_step
from vaejob.training.worker import Report, Worker


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
) -> None:
    """Trains until job.training.images are seen or the job is asked to stop; either way a checkpoint is the end.

    Reports, held-out passes and checkpoints fall on the same images for any number of workers, and a checkpoint always
    ends a report, so that the history of a resumed run is that of an uninterrupted one.
    """
    model = _distributed(state.scorer, worker)
    started_at = state.images_seen
    totals = RunningTotals(dims_per_image=dims_per_image, device=worker.device)
    objective_nats = torch.zeros((), dtype=torch.float64, device=worker.device)
    digest, rate = 0, job.optimizer.learning_rate
    timed = _Timed(batches)

    for batch in timed:
        before = state.images_seen
        state.images_seen = batch.place.epoch * images_per_epoch + batch.place.stop
        rate = learning_rate(job.optimizer, images_seen=before, images=job.training.images)
        terms = train_step(
            model,
            state.optimizer,
            _to_device(batch.images, worker.device),
            batch.ids,
            job=job,
            pixels=state.scorer.pixels,
            epoch=batch.place.epoch,
            beta=beta(job.objective, images_seen=before),
            learning_rate=rate,
            weight=worker.world_size / batch.place.images,
        )
        totals.add(terms.bound)
        objective_nats += terms.objective_nats
        digest += ids_digest(batch.ids, epoch=batch.place.epoch)

        done = state.images_seen >= job.training.images
        save = done or crosses(job.checkpoint.every_images, before=before, after=state.images_seen)
        look = held_out is not None and (
            done or crosses(job.training.evaluate_every_images, before=before, after=state.images_seen)
        )
        if not (save or look or crosses(job.training.report_every_images, before=before, after=state.images_seen)):
            continue

        trained = totals.to_host()
        _refuse_divergence(trained, state.images_seen)
        seconds = timed.seconds()
        stop = worker.should_stop()
        if save or stop:
            writer.save(state.images_seen, state_tensors(state.scorer, state.optimizer))
        worker.report(
            Report(
                images_seen=state.images_seen,
                attempt=attempt,
                attempt_started_at_images=started_at,
                rank=worker.rank,
                world_size=worker.world_size,
                train=trained,
                objective_nats=float(objective_nats),
                ids_digest=digest % 2**64,
                learning_rate=rate,
                seconds=seconds,
                data_wait_seconds=timed.waited(),
                held_out=_held_out(job, worker, state, held_out) if look and held_out else None,
                saved=writer.saved(),
                notes=notes,
            )
        )
        notes = ()
        totals.clear()
        objective_nats.zero_()
        digest = 0
        timed.restart()
        if stop:
            break

    writer.finish()
    worker.report(
        Report(
            images_seen=state.images_seen,
            attempt=attempt,
            attempt_started_at_images=started_at,
            rank=worker.rank,
            world_size=worker.world_size,
            saved=writer.saved(),
            last=True,
        )
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


def _to_device(images: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(images)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _refuse_divergence(totals: LikelihoodTotals, images_seen: int) -> None:
    if totals.non_finite:
        raise ConfigError(
            f"the bound of {totals.non_finite} images is not finite at {images_seen} images seen; "
            "lower optimizer.learning_rate, or set optimizer.warmup_images or optimizer.clip"
        )


class _Timed:
    """Batches, with the time since the last report and how much of it was spent waiting for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.restart()

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def waited(self) -> float:
        return self._waited

    def restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
