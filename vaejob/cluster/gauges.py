"""What a running job tells Prometheus, through the exporter that every node of a Ray cluster has.

Ray exports `NAME` as `ray_NAME`, a counter as `ray_NAME_total`, within 10 s; a gauge is gone 20 s after the driver.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge

from vaejob.config import JobConfig
from vaejob.likelihood.pixels import make_pixels
from vaejob.metrics import LikelihoodTotals
from vaejob.storage.runs import Row
from vaejob.training.worker import Event

SPLITS = {"train": "train", "test": "held_out"}
"""A row's split, and what the label says."""
MOST_CAUSES = 16
"""Stores have words of their own for what went wrong: those beyond so many are counted as one."""
OTHER_CAUSES = "other"
REPORTS_KEPT = 1000
SECONDS_BETWEEN_SETTINGS = 1.0


class Metric(NamedTuple):
    """One name; each of its series is labelled with the run."""

    kind: Literal["gauge", "counter"]
    about: str
    labels: tuple[str, ...] = ()


METRICS = {
    "vaejob_bits_per_dim": Metric("gauge", "Negative bound of the last report, bits/dim of levels", ("split",)),
    "vaejob_bound_nats": Metric("gauge", "Negative bound of the last report, nats per image", ("split",)),
    "vaejob_non_finite_images": Metric("gauge", "Images of the last report whose bound is not finite", ("split",)),
    "vaejob_images_seen": Metric("gauge", "Images trained on; falls when the run goes on from a checkpoint"),
    "vaejob_images_wanted": Metric("gauge", "Images at which the run is done"),
    "vaejob_images_per_second": Metric("gauge", "Images trained on in each second of the last report, by all workers"),
    "vaejob_data_wait_ratio": Metric("gauge", "Share of the last report's time in which the step waited for images"),
    "vaejob_checkpoint_images": Metric("gauge", "Images seen at the newest checkpoint"),
    "vaejob_checkpoint_every_images": Metric("gauge", "Images between two checkpoints; 0: only at the end"),
    "vaejob_checkpoint_timestamp_seconds": Metric("gauge", "Unix time at which this start's newest checkpoint was there"),
    "vaejob_checkpoint_commit_seconds": Metric("gauge", "From the report at the newest checkpoint to its commit"),
    "vaejob_retries": Metric("counter", "Requests to buckets that were repeated", ("cause",)),
    "vaejob_steps": Metric("counter", "Optimisation steps, the skipped ones included"),
    "vaejob_skipped_steps": Metric("counter", "Steps skipped since their gradient was too large or not finite"),
    "vaejob_non_finite_steps": Metric("counter", "Of the skipped, those whose gradient was not finite"),
    "vaejob_workers": Metric("gauge", "Workers that made the last report"),
    "vaejob_workers_wanted": Metric("gauge", "Workers that the job asks for, at most if it is elastic"),
    "vaejob_start_number": Metric("gauge", "Number of this start of the job, as in the run's attempts/"),
    "vaejob_start_timestamp_seconds": Metric("gauge", "Unix time of this start of the job"),
    "vaejob_attempts": Metric("counter", "Times that workers began to train, in this start of the job"),
}  # fmt: skip


def exported_name(name: str) -> str:
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


class Reading(NamedTuple):
    """What to set a gauge to, or to add to a counter."""

    name: str
    value: float
    label: str | None = None
    """The value of the metric's own label, if it has one."""


class Readings:
    """What a job's events say, as numbers."""

    def __init__(self, job: JobConfig, *, start: int) -> None:
        """start: the number that the token of this start holds."""
        self._job, self._start = job, start
        self._began_at = time.time()
        self._density_bits = make_pixels(job.likelihood).density_bits_correction
        self._attempt = ""
        self._reported: deque[tuple[int, str]] = deque(maxlen=REPORTS_KEPT)
        self._causes: set[str] = set()

    def of_job(self) -> list[Reading]:
        """What is known before any report."""
        return [
            Reading("vaejob_images_wanted", self._job.training.images),
            Reading("vaejob_workers_wanted", self._job.cluster.most_workers),
            Reading("vaejob_checkpoint_every_images", self._job.checkpoint.every_images),
            Reading("vaejob_start_number", self._start),
            Reading("vaejob_start_timestamp_seconds", self._began_at),
        ]

    def of(self, event: Event) -> list[Reading]:
        match event.kind:
            case "row":
                return self._of_row(event.body)
            case "record":
                return self._of_record(event.body)
            case _:
                return []

    def _of_row(self, row: Row) -> list[Reading]:
        readings = self._of_bound(row)
        readings += [Reading("vaejob_images_seen", row["images_seen"]), Reading("vaejob_workers", row["world_size"])]
        if row["attempt"] != self._attempt:
            self._attempt = row["attempt"]
            readings.append(Reading("vaejob_attempts", 1))
            readings.append(Reading("vaejob_checkpoint_images", row["attempt_started_at_images"]))
        if row["split"] == "train":
            self._reported.append((row["images_seen"], row["written_at"]))
            readings += self._of_training(row)
        return readings

    def _of_bound(self, row: Row) -> list[Reading]:
        totals, split = LikelihoodTotals.from_dict(row), SPLITS[row["split"]]
        finite = not totals.non_finite  # else Ray exports no series rather than an old number
        return [
            Reading("vaejob_bits_per_dim", totals.bits_per_dim + self._density_bits if finite else math.nan, split),
            Reading("vaejob_bound_nats", totals.mean("negative_bound") if finite else math.nan, split),
            Reading("vaejob_non_finite_images", totals.non_finite, split),
        ]

    def _of_training(self, row: Row) -> list[Reading]:
        causes: dict[str, int] = json.loads(row["retry_causes"])
        return [
            Reading("vaejob_images_per_second", row["images"] / row["seconds"]),
            Reading("vaejob_data_wait_ratio", row["data_wait_seconds"] / row["seconds"]),
            Reading("vaejob_steps", row["steps"]),
            Reading("vaejob_skipped_steps", row["skipped_steps"]),
            Reading("vaejob_non_finite_steps", row["non_finite_steps"]),
            *(Reading("vaejob_retries", times, self._known(cause)) for cause, times in causes.items()),
        ]

    def _of_record(self, record: dict[str, Any]) -> list[Reading]:
        images_seen, committed_at = record["images_seen"], _unix(record["written_at"])
        reported = [_unix(at) for images, at in self._reported if images == images_seen]
        return [
            Reading("vaejob_checkpoint_images", images_seen),
            Reading("vaejob_checkpoint_timestamp_seconds", committed_at),
            *(Reading("vaejob_checkpoint_commit_seconds", committed_at - at) for at in reported[-1:]),
        ]

    def _known(self, cause: str) -> str:
        if len(self._causes) < MOST_CAUSES:
            self._causes.add(cause)
        return cause if cause in self._causes else OTHER_CAUSES


class Gauges:
    """Passes a job's events on, and sets Ray's metrics to what they say. What fails in that is told once, and no more is set."""

    def __init__(self, job: JobConfig, *, start: int, on_event: Callable[[Event], None]) -> None:
        self._readings = Readings(job, start=start)
        self._run, self._on_event = job.run.name, on_event
        self._metrics: dict[str, Gauge | Counter] = {}
        self._now: dict[tuple[str, str | None], Reading] = {}
        self._kept_at = float("-inf")
        self._failed = False

    def tell(self, event: Event) -> None:
        self._on_event(event)
        self._try(lambda: self._take(self._readings.of(event)))

    def keep(self) -> None:
        """Called twice a second or so: what has not been set for two of Ray's intervals, it exports no more."""
        if time.monotonic() - self._kept_at > SECONDS_BETWEEN_SETTINGS:
            self._kept_at = time.monotonic()
            self._try(lambda: self._set(self._now.values()))

    def _take(self, readings: list[Reading]) -> None:
        if not self._metrics:
            self._metrics = {name: _of_ray(name, metric) for name, metric in METRICS.items()}
            self._take(self._readings.of_job())
        self._now |= {(each.name, each.label): each for each in readings if METRICS[each.name].kind == "gauge"}
        self._set(readings)

    def _set(self, readings: Iterable[Reading]) -> None:
        for name, value, label in readings:
            tags = {"run": self._run} | ({} if label is None else {METRICS[name].labels[0]: label})
            metric = self._metrics[name]
            if isinstance(metric, Gauge):
                metric.set(value, tags)
            elif value:  # a counter takes no zero
                metric.inc(value, tags)

    def _try(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            text = f"no more metrics for Prometheus, the job goes on without: {type(error).__name__}: {error}"
            self._on_event(Event("note", {"text": text}))


def _of_ray(name: str, metric: Metric) -> Gauge | Counter:
    of_kind = Gauge if metric.kind == "gauge" else Counter
    return of_kind(name, metric.about, ("run", *metric.labels))


def _unix(written_at: str) -> float:
    return datetime.fromisoformat(written_at).timestamp()
