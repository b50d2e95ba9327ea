"""What runs in Ray Train's controller: hands totals to the ledger, and judges what becomes of workers that failed."""

import logging
import queue
import re
import threading
import time
from typing import Any

import ray
import ray.exceptions
from ray.train import UserCallback

from vaejob.cluster.board import Beat
from vaejob.cluster.join import first_line
from vaejob.cluster.worker import StartAgain
from vaejob.config import JobConfig
from vaejob.errors import BucketError, ClusterError, UserError, VaejobError
from vaejob.run import make_ledger, open_inputs, run_address
from vaejob.storage.fence import Token
from vaejob.training.worker import Event, Report

LAST_WRITES_SECONDS = 300
LOG = logging.getLogger("ray.train.vaejob")
"""Below Ray Train's logger, which writes lines of JSON to train/ among the logs of the controller's node."""


class KeepLedger(UserCallback):
    """Hands every worker's totals to the ledger, which a thread of its own writes.

    It never waits while training goes on: the controller's loop would stand still. What it raises ends the run, with the
    workers and their placement group put away. A driver that ended it from outside could do so while the controller places
    the workers of the next attempt, and those places would stay taken for as long as the cluster lives.
    """

    def __init__(self, job: JobConfig, board: Any, token: Token) -> None:
        self._job, self._board, self._token = job, board, token
        self._reports: queue.Queue[list[list[Report]]] | None = None
        self._failure: Exception | None = None
        self._failures = 0
        self._told: str | None = None
        self._attempt: str | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if self._reports is None:
            self._reports = queue.Queue()
            threading.Thread(target=self._write, args=(self._reports,), name="ledger", daemon=True).start()
        of_ranks = [[Report.from_dict(report) for report in message["reports"]] for message in metrics]
        reports = [list(same_moment) for same_moment in zip(*of_ranks, strict=True)]
        self._attempt = reports[-1][0].attempt
        self._reports.put(reports)
        if reports[-1][0].last:
            self._board.dismiss.remote()  # nothing moves any more
            self._wait_for_writes(self._reports)
        if self._failure is not None:
            raise self._failure  # what was not written is not there
        if reports[-1][0].last:
            ray.get(self._board.wrote_last_of.remote(reports[-1][0].attempt))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers that have failed are started again, until they have done so cluster.max_failures times."""
        who: dict[int, Beat] = ray.get(self._board.dismiss.remote())
        for error in worker_exceptions.values():
            if isinstance(cause := cause_of(error), UserError):
                raise cause  # workers that are started again would find the same input
        planned = [error for error in worker_exceptions.values() if isinstance(error, StartAgain)]
        if planned:  # what their peers raise is that these have gone
            if self._told != str(planned[0]):
                self._told = str(planned[0])
                self._note(self._told)
            return
        texts = {
            rank: f"{who.get(rank, f'worker {rank}')} failed: {why(error)}" for rank, error in worker_exceptions.items()
        }
        for rank, text in texts.items():
            self._note(text, rank=rank)
        self._failures += not any(was_preempted(error) for error in worker_exceptions.values())
        if self._failures > self._job.cluster.max_failures:
            error = next(iter(worker_exceptions.values()))
            if not died(error):
                raise error
            raise ClusterError(
                f"the workers failed {self._failures} times, and cluster.max_failures is {self._job.cluster.max_failures}; "
                f"the last time: {next(iter(texts.values()))}; repeat the command to continue the run"
            )

    def _note(self, text: str, *, rank: int | None = None) -> None:
        event = Event("note", {"text": text})
        self._log(event, rank=rank)
        self._board.post.remote(event)

    def _log(self, event: Event, *, rank: int | None = None) -> None:
        """rank: of whom it is, if it is not of all."""
        known = ("attempt", "split", "images_seen", "images", "dims", "negative_bound_nats", "seconds", "world_size")
        told = {name: event.body[name] for name in known if name in event.body}
        where = {"run": self._job.run.name, "start": self._token.number, "attempt": self._attempt, "rank": rank}
        LOG.info(event.body.get("text", event.kind), extra=where | told)

    def _write(self, reports: "queue.Queue[list[list[Report]]]") -> None:
        ledger = None
        while True:
            item = reports.get()
            try:
                ledger = ledger or make_ledger(
                    self._job, open_inputs(self._job), on_event=self._post, token=self._token
                )
                ledger.add(item)
            except Exception as error:
                self._failure = self._failure or error
            finally:
                reports.task_done()

    def _post(self, event: Event) -> None:
        self._log(event)
        ray.get(self._board.post.remote(event))

    def _wait_for_writes(self, reports: "queue.Queue[list[list[Report]]]") -> None:
        patience = LAST_WRITES_SECONDS + self._job.checkpoint.outage_seconds
        deadline = time.monotonic() + patience
        while reports.unfinished_tasks:
            if time.monotonic() > deadline:
                raise BucketError(f"{run_address(self._job)}: the last rows took more than {patience:.0f} s to write")
            time.sleep(0.02)


def died(error: Exception) -> ray.exceptions.RayActorError | None:
    """What Ray says of a worker whose process or node is gone; None if the worker itself raised."""
    failure = getattr(error, "health_check_failure", error)
    return failure if isinstance(failure, ray.exceptions.RayActorError) else None


def was_preempted(error: Exception) -> bool:
    death = died(error)
    return death is not None and death.preempted


def why(error: Exception) -> str:
    """In one line; of a death the sentence that tells how, which stands below what was running."""
    failure = getattr(error, "health_check_failure", None)
    if failure is None:
        return first_line(error)
    text = " ".join(str(failure).split())
    if "memory usage" in text and "killed" in text and "Some common causes" not in text:
        return "its node ran out of memory, and Ray killed it"
    if "connection error code 2" in text:
        return "its process was killed: by the kernel where memory runs out, else by hand, or it crashed"
    found = re.search(r"The actor (is dead|died) because [^.]*", text)
    return found.group() if found else text[-200:]


def cause_of(error: BaseException) -> BaseException:
    """The user's own error out of Ray's wrapping of it."""
    seen: list[BaseException] = [error]
    while seen:
        current = seen.pop(0)
        if isinstance(current, VaejobError):
            return current
        # WorkerGroupError keeps what each rank raised, ControllerError what the ledger did, RayTaskError what the task did.
        kept = [getattr(current, name, None) for name in ("__cause__", "cause", "controller_failure")]
        inner = [*kept, *getattr(current, "worker_failures", {}).values()]
        seen += [error for error in inner if isinstance(error, BaseException)]
    if isinstance(error, ray.exceptions.RayError):
        return ClusterError(f"the cluster was lost: {first_line(error)}; repeat the command to continue the run")
    return error
