"""Runs a job on a Ray cluster: places the workers, adds up their totals, and tells what happens."""

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train import ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig

from vaejob import errors
from vaejob.cluster.worker import failure, train_worker
from vaejob.config import ClusterConfig, JobConfig
from vaejob.errors import ClusterError, VaejobError
from vaejob.run import make_ledger, open_inputs, prepare
from vaejob.storage.runs import new_attempt
from vaejob.training.worker import Event, Report

HEALTH_CHECK_SECONDS = 0.5
COLLECTIVE_TIMEOUT_SECONDS = 300
LAST_WRITES_SECONDS = 300


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
            text = f"worker {rank} failed: {_first_line(error)}"
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
    """Runs the job to its end, or to a checkpoint once should_stop says so; it is asked, and events told, twice a second.

    Raises what was wrong with the input, ClusterError when the cluster is too small or lost, BucketError when the
    ledger cannot be written.
    """
    prepare(job)
    address = cluster_address(job.cluster)
    on_event(_status(f"joining the Ray cluster at {address}" if address else "starting a Ray cluster on this machine"))
    with cluster_of(job.cluster):
        wait_for_room(job.cluster)
        on_event(_status(f"starting {job.cluster.workers} workers"))
        board = ray.remote(num_cpus=0)(Board).remote()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job.model_dump(), "board": board},
            scaling_config=_scaling(job.cluster),
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            # Ray's own storage holds nothing of ours: a folder of this attempt alone, that cannot be stale or torn.
            run_config=RunConfig(
                name=new_attempt(),
                storage_path=tempfile.mkdtemp(prefix="vaejob-ray-"),
                failure_config=FailureConfig(max_failures=job.cluster.max_failures, controller_failure_limit=20),
                callbacks=[KeepLedger(job, board)],
            ),
        )
        failure: list[BaseException] = []
        fit = threading.Thread(target=_fit, args=(trainer, failure), name="fit", daemon=True)
        fit.start()
        stopping = False
        while fit.is_alive():
            fit.join(timeout=0.5)
            _pass_on(board, on_event)
            if not stopping and should_stop():
                board.ask_stop.remote()
                stopping = True
        _pass_on(board, on_event)
        if failure:
            raise _cause(failure[0]) from failure[0]


def _fit(trainer: TorchTrainer, failure: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:
        failure.append(error)


def _pass_on(board: Any, on_event: Callable[[Event], None]) -> None:
    for event in ray.get(board.take_events.remote()):
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


def cluster_address(config: ClusterConfig) -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def cluster_of(config: ClusterConfig) -> Iterator[None]:
    """The cluster of the settings or of RAY_ADDRESS; without either one on this machine, for as long as the job."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_SECONDS),
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    address = cluster_address(config)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    try:
        if address:
            ray.init(address=address, namespace="vaejob", **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            cpus = max(os.cpu_count() or 1, 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, namespace="vaejob", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster could be reached at {address or 'this machine'}: {_first_line(error)}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def wait_for_room(config: ClusterConfig) -> None:
    """Waits until the cluster has room for the workers. Raises ClusterError with what was asked and what there is."""
    asked = {"CPU": config.workers * config.cpus_per_worker, "GPU": config.workers * config.gpus_per_worker}
    deadline = time.monotonic() + config.wait_seconds
    while True:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        if all(free.get(kind, 0) >= number for kind, number in asked.items()):
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(0.5)
    wants = " and ".join(f"{number} {kind}s" for kind, number in asked.items() if number)
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    has = " and ".join(f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in asked)
    nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
    raise ClusterError(
        f"cluster.workers is {config.workers}: they ask for {wants}, the cluster has {has} on {nodes} nodes; "
        f"waited {config.wait_seconds:g} s (cluster.wait_seconds)"
    )


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
        return ClusterError(f"the cluster was lost: {_first_line(error)}; repeat the command to continue the run")
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
