"""Sends a job's numbers to MLflow and Weights & Biases as they come; nothing there can hold up or end the job.

A run keeps all of it in its own bucket; what is sent is a copy, and continues where an earlier start of the run left it.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from vaejob.errors import UserError

if TYPE_CHECKING:
    from vaejob.config import JobConfig, Tracker
    from vaejob.training.worker import Event

SECONDS_AT_THE_END = 60.0
"""How long a job that has ended waits for what is not sent yet."""
PROJECT = "vaejob"
"""The experiment of MLflow and the project of Weights & Biases, unless their own variables name another."""
_SPLITS = {"train": "train", "test": "held_out"}


class Copy(Protocol):
    """The copy of one run in a tracker."""

    def add(self, numbers: dict[str, float], *, images_seen: int, seconds: float) -> None: ...
    def end(self, *, finished: bool) -> None: ...


@contextmanager
def tracked(
    job: "JobConfig", on_event: Callable[["Event"], None], *, warn: Callable[[str], None]
) -> Iterator[Callable[["Event"], None]]:
    """An on_event that sends rows to run.trackers as well. Raises UserError for one that cannot be reached from here."""
    for name in job.run.trackers:
        refuse_unready(name)
    senders = [Sender(name, job, warn=warn) for name in job.run.trackers]

    def tell(event: "Event") -> None:
        on_event(event)
        if event.kind == "row":
            for sender in senders:
                sender.take(event.body)

    try:
        yield tell
    finally:
        for sender in senders:
            sender.end()


def refuse_unready(name: "Tracker") -> None:
    """Before anything is trained: wandb would ask for its key in the middle of it."""
    if find_spec(name) is None:
        raise UserError(f"run.trackers names {name}, which is not installed here: pip install 'vaejob[{name}]'")
    if name == "wandb":
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("run.trackers names wandb, which has no key here: set WANDB_API_KEY, or WANDB_MODE=offline")


class Sender:
    """Sends from a thread of its own, in order. The first failure ends it: it is told once, and the job goes on."""

    def __init__(self, name: "Tracker", job: "JobConfig", *, warn: Callable[[str], None]) -> None:
        self._name, self._job, self._warn = name, job, warn
        self._rows = queue.SimpleQueue[dict[str, Any] | None]()
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._failed = False
        self._thread.start()

    def take(self, row: dict[str, Any]) -> None:
        if not self._failed:
            self._rows.put(row)

    def end(self) -> None:
        self._rows.put(None)
        self._thread.join(SECONDS_AT_THE_END)
        if self._thread.is_alive():
            self._warn(f"{self._name} has not taken everything within {SECONDS_AT_THE_END:.0f} s; the run has it all")

    def _send_all(self) -> None:
        try:
            copy, images_seen = _OPEN[self._name](self._job), 0
            while (row := self._rows.get()) is not None:
                seconds = datetime.fromisoformat(row["written_at"]).timestamp()
                copy.add(numbers_of(row, self._job), images_seen=row["images_seen"], seconds=seconds)
                images_seen = row["images_seen"]
            copy.end(finished=images_seen >= self._job.training.images)
        except Exception as error:  # whatever it is, the job is not its
            self._failed = True
            why = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"{self._name}: {why}; nothing more is sent there by this start of the job, the run has it all")


def numbers_of(row: dict[str, Any], job: "JobConfig") -> dict[str, float]:
    """What a row says of the images since the row before, as vaejob show --json names it; SPLIT/NAME: value."""
    from vaejob.cli.overview import likelihood_numbers
    from vaejob.totals import LikelihoodTotals

    totals, split = LikelihoodTotals.from_dict(row), _SPLITS[row["split"]]
    numbers = likelihood_numbers(totals, job.likelihood) if totals.images else {}
    if row["split"] == "train":
        numbers |= {name: row[name] for name in ("learning_rate", "world_size", "retries", "missing_images")}
        numbers |= {"skipped_steps": row["skipped_steps"], "halvings": row["halvings"]}
        if taken := row["steps"] - row["skipped_steps"]:
            numbers["gradient_norm"] = row["gradient_norms"] / taken
        if row["seconds"]:
            numbers["images_per_second"] = row["images"] / row["seconds"]
            numbers["data_wait_share"] = row["data_wait_seconds"] / row["seconds"]
    return {f"{split}/{name}": float(value) for name, value in numbers.items() if value is not None}


def _settings(job: "JobConfig") -> dict[str, str]:
    sections = job.model_dump(exclude={"deploy"}).items()
    return {f"{section}.{key}": str(value) for section, values in sections for key, value in values.items()}


def _identity(job: "JobConfig") -> str:
    """One run, one copy: all starts of a run of this name in this bucket."""
    return hashlib.sha256(f"{job.run.bucket}/{job.run.name}".encode()).hexdigest()[:32]


class _MLflow:
    """To MLFLOW_TRACKING_URI, into the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, job: "JobConfig") -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        identity, settings = _identity(job), _settings(job)
        found = client.search_runs([experiment_id], f"tags.`vaejob.identity` = '{identity}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            # A parameter is for good there; what a later start of the run changed becomes a tag.
            before = found[0].data.params
            changed = {key: value for key, value in settings.items() if before.get(key) != value}
            client.log_batch(self._run, tags=[RunTag(key, value) for key, value in changed.items()])
        else:
            tags = {"vaejob.identity": identity, "vaejob.run": f"{job.run.bucket}/{job.run.name}"}
            self._run = client.create_run(experiment_id, tags=tags, run_name=job.run.name).info.run_id
            client.log_batch(self._run, params=[Param(key, value) for key, value in settings.items()])

    def add(self, numbers: dict[str, float], *, images_seen: int, seconds: float) -> None:
        from mlflow.entities import Metric

        at = int(seconds * 1000)
        self._client.log_batch(self._run, [Metric(key, value, at, images_seen) for key, value in numbers.items()])

    def end(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class _Wandb:
    """To the project WANDB_PROJECT; curves are over images_seen, which may go back where a start began anew."""

    def __init__(self, job: "JobConfig") -> None:
        import wandb

        self._run = wandb.init(
            id=_identity(job),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=job.run.name,
            config=_settings(job),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def add(self, numbers: dict[str, float], *, images_seen: int, seconds: float) -> None:
        self._run.log(numbers | {"images_seen": images_seen, "written_at": seconds})

    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_OPEN: dict[str, Callable[["JobConfig"], Copy]] = {"mlflow": _MLflow, "wandb": _Wandb}
