"""Runs a job on a Ray cluster: places the workers, sees to them, and tells what happens."""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vaejob.cluster.board import Board
from vaejob.cluster.gauges import Gauges
from vaejob.cluster.join import StopAsked, cluster_address, cluster_of, placement_seconds, wait_for_room
from vaejob.cluster.keeper import KeepLedger, cause_of
from vaejob.cluster.watch import START_PATIENCE, Watch, bundle
from vaejob.cluster.worker import train_worker
from vaejob.config import ClusterConfig, JobConfig
from vaejob.storage.fence import Token
from vaejob.training.worker import Event

PLACEMENT_SECONDS = 1200
"""In all: what was free when the job began may be taken before its workers start, and a lost node may be replaced."""
STOP_SECONDS = 45
"""A job that has been asked to stop waits so long for workers that are not there yet."""
LONG_AFTER = 1e9


def train_on_cluster(
    job: JobConfig,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool] = lambda: False,
    token: Token,
) -> None:
    """Runs the job, which has begun, to its end, or to a checkpoint once should_stop says so.

    It is asked, and events are told, twice a second, both on the calling thread. token: what `begin` returned.
    Raises what was wrong with the input, ClusterError when the cluster is too small or lost, BucketError when the
    ledger cannot be written.
    """
    address = cluster_address(job.cluster)
    on_event(_status(f"joining the Ray cluster at {address}" if address else "starting a Ray cluster on this machine"))
    # Ray's own storage holds nothing of ours: a folder of this attempt alone, that cannot be stale or torn.
    try:
        with (
            cluster_of(job.cluster, should_stop=should_stop),
            tempfile.TemporaryDirectory(prefix="vaejob-ray-") as scratch,
        ):
            gauges = Gauges(job, start=token.number, on_event=on_event)
            wait_for_room(job.cluster, should_stop=should_stop, on_wait=lambda line: gauges.tell(_status(line)))
            least, most = job.cluster.least_workers, job.cluster.most_workers
            count = f"{most} worker{'' if most == 1 else 's'}" if least == most else f"{least} to {most} workers"
            gauges.tell(_status(f"starting {count}"))
            _run(job, scratch, token, gauges, should_stop=should_stop)
    except StopAsked:
        return


def _run(
    job: JobConfig,
    scratch: str,
    token: Token,
    gauges: Gauges,
    *,
    should_stop: Callable[[], bool],
) -> None:
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # which no loss takes away
    board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    watch = Watch(job.cluster, board, on_event=gauges.tell)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    fit = threading.Thread(target=_fit, args=(_trainer(job, board, scratch, token), ended), name="fit", daemon=True)
    fit.start()
    stopping, asked_at = False, 0.0
    while fit.is_alive():
        fit.join(timeout=0.5)
        if not stopping and should_stop():
            board.ask_stop.remote()
            stopping, asked_at = True, time.monotonic()
        watch.look()
        gauges.keep()
        if stopping and time.monotonic() - max(asked_at, watch.workers_seen_at) > STOP_SECONDS:
            return  # nobody is there to save anything
    watch.look()
    if (error := ended.get()) is not None:
        raise cause_of(error) from error


def _trainer(job: JobConfig, board: Any, scratch: str, token: Token) -> TorchTrainer:
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job.model_dump(), "board": board},
        scaling_config=_scaling(job.cluster),
        # The watch comes first, and so does the end of all patience with images that cannot be read.
        torch_config=TorchConfig(
            timeout_s=int(2 * START_PATIENCE * job.cluster.hang_seconds + job.checkpoint.outage_seconds)
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            name=f"{job.run.name}-start-{token.number}",  # as Ray's logs and its dashboard call it
            storage_path=scratch,
            # Ray Train starts workers again as often as they fail; KeepLedger counts, for it knows what was planned.
            failure_config=FailureConfig(
                max_failures=-1,
                max_preemption_failures=-1,
                controller_failure_limit=PLACEMENT_SECONDS // placement_seconds(job.cluster),
            ),
            callbacks=[KeepLedger(job, board, token)],
            worker_runtime_env={"env_vars": environment(job.cluster)},
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


def environment(config: ClusterConfig) -> dict[str, str]:
    """Of workers. Ray Train calls the loop on a thread, and of its own memory glibc gives a thread 64 MB at a time: larger
    tensors of a CPU would come from the kernel anew at each step (`freed_memory_kept`)."""
    return {} if config.gpus_per_worker else {"MALLOC_ARENA_MAX": "1"}


def _scaling(config: ClusterConfig) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(config.least_workers, config.most_workers) if config.elastic else config.most_workers,
        elastic_resize_monitor_interval_s=LONG_AFTER,  # growth is the watch's
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=bundle(config),
    )


def _status(text: str) -> Event:
    return Event("status", {"text": text})
