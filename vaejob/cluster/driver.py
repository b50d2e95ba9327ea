"""Runs a job on a Ray cluster: places the workers, adds up their totals, and tells what happens."""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train import ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig

from vaejob import errors
from vaejob.cluster.join import cluster_address, cluster_of, first_line, wait_for_room
from vaejob.cluster.worker import failure, train_worker
from vaejob.config import ClusterConfig, JobConfig
from vaejob.errors import ClusterError, VaejobError
from vaejob.run import make_ledger, open_inputs
from vaejob.storage.runs import new_attempt
from vaejob.training.worker import Event, Report

COLLECTIVE_TIMEOUT_SECONDS = 300
LAST_WRITES_SECONDS = 300
BOARD_SECONDS = 60
PLACEMENTS_THAT_MAY_FAIL = 20
"""Of a minute each: what was free when the job began may be taken before its workers start."""


class Board:
    """Where the driver's process, the controller and the workers leave word for one another."""

    def __init__(self) -> None:
        self._stop = False
        self._events: list[Event] = []

    def ask_stop(self) -> None:
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take_events(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken


class KeepLedger(UserCallback):
    """Runs in Ray Train's controller: hands every worker's totals to the ledger, which a thread of its own writes.

    It never raises and never waits while training goes on: the controller's loop would stand still, or the run end.
    """

    def __init__(self, job: JobConfig, board: Any) -> None:
        self._job, self._board = job, board
        self._reports: queue.Queue[list[list[Report]]] | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if self._reports is None:
            self._reports = queue.Queue()
            threading.Thread(target=self._write, args=(self._reports,), name="ledger", daemon=True).start()
        of_ranks = [[Report.from_dict(report) for report in message["reports"]] for message in metrics]
        reports = [list(same_moment) for same_moment in zip(*of_ranks, strict=True)]
        self._reports.put(reports)
        if reports[-1][0].last:
            self._wait_for_writes(self._reports)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            text = f"worker {rank} failed: {first_line(error)}"
            self._board.post.remote(Event("note", {"text": text}))

    def _write(self, reports: "queue.Queue[list[list[Report]]]") -> None:
        ledger = None
        while True:
            item = reports.get()
            try:
                ledger = ledger or make_ledger(self._job, open_inputs(self._job), on_event=self._post)
                ledger.add(item)
            except Exception as error:
                # What was not written is not there; the driver ends the job, saying why.
                self._post(failure(error))
            finally:
                reports.task_done()

    def _post(self, event: Event) -> None:
        ray.get(self._board.post.remote(event))

    def _wait_for_writes(self, reports: "queue.Queue[list[list[Report]]]") -> None:
        deadline = time.monotonic() + LAST_WRITES_SECONDS
        while reports.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)


def train_on_cluster(
    job: JobConfig, *, on_event: Callable[[Event], None], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Runs the job, which has begun, to its end, or to a checkpoint once should_stop says so.

    It is asked, and events are told, twice a second, both on the calling thread.
    Raises what was wrong with the input, ClusterError when the cluster is too small or lost, BucketError when the
    ledger cannot be written.
    """
    address = cluster_address(job.cluster)
    on_event(_status(f"joining the Ray cluster at {address}" if address else "starting a Ray cluster on this machine"))
    # Ray's own storage holds nothing of ours: a folder of this attempt alone, that cannot be stale or torn.
    with cluster_of(job.cluster), tempfile.TemporaryDirectory(prefix="vaejob-ray-") as scratch:
        wait_for_room(job.cluster)
        on_event(_status(f"starting {job.cluster.workers} workers"))
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        fit = threading.Thread(target=_fit, args=(_trainer(job, board, scratch), ended), name="fit", daemon=True)
        fit.start()
        stopping = False
        while fit.is_alive():
            fit.join(timeout=0.5)
            if not stopping and should_stop():
                board.ask_stop.remote()
                stopping = True
            _pass_on(board, on_event)
        _pass_on(board, on_event)
        if (error := ended.get()) is not None:
            raise _cause(error) from error


def _trainer(job: JobConfig, board: Any, scratch: str) -> TorchTrainer:
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job.model_dump(), "board": board},
        scaling_config=_scaling(job.cluster),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        run_config=RunConfig(  # type: ignore[arg-type]
            name=new_attempt(),
            storage_path=scratch,
            failure_config=FailureConfig(
                max_failures=job.cluster.max_failures, controller_failure_limit=PLACEMENTS_THAT_MAY_FAIL
            ),
            callbacks=[KeepLedger(job, board)],
        ),
    )


def _fit(trainer: TorchTrainer, ended: "queue.SimpleQueue[BaseException | None]") -> None:
    """In a thread of its own, so that signals and events find the main thread free."""
    try:
        trainer.fit()
    except BaseException as error:
        ended.put(error)
    else:
        ended.put(None)


def _pass_on(board: Any, on_event: Callable[[Event], None]) -> None:
    try:
        events = ray.get(board.take_events.remote(), timeout=BOARD_SECONDS)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"the cluster was lost: {first_line(error)}; repeat the command to continue the run"
        ) from error
    for event in events:
        if event.kind == "failure":
            known = getattr(errors, event.body["error"], None)
            raise known(event.body["text"]) if known else ClusterError(f"{event.body['error']}: {event.body['text']}")
        on_event(event)


def _scaling(config: ClusterConfig) -> ScalingConfig:
    resources = {"CPU": float(config.cpus_per_worker)}
    if config.gpus_per_worker:
        resources["GPU"] = float(config.gpus_per_worker)
    return ScalingConfig(num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources)


def _status(text: str) -> Event:
    return Event("status", {"text": text})


def _cause(error: BaseException) -> BaseException:
    """The user's own error out of Ray's wrapping of it."""
    seen: list[BaseException] = [error]
    while seen:
        current = seen.pop(0)
        if isinstance(current, VaejobError):
            return current
        # WorkerGroupError keeps what each rank raised, RayTaskError what the task raised.
        inner = [current.__cause__, getattr(current, "cause", None), *getattr(current, "worker_failures", {}).values()]
        seen += [error for error in inner if isinstance(error, BaseException)]
    if isinstance(error, ray.exceptions.RayError):
        return ClusterError(f"the cluster was lost: {first_line(error)}; repeat the command to continue the run")
    return error
