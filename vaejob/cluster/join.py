"""Joins a Ray cluster, or starts one on this machine, and waits until it has room."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from vaejob.config import ClusterConfig
from vaejob.errors import ClusterError

HEALTH_CHECK_SECONDS = 0.5
OWN_CLUSTER_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        if address:
            _refuse_silent(address, wait_seconds=config.wait_seconds)
            ray.init(address=address, namespace="vaejob", **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(address="local", include_dashboard=False, namespace="vaejob", **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"no Ray cluster could be reached at {address or 'this machine'}: {first_line(error)}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ray.init puts its own in their place, which end the process
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str, *, wait_seconds: float) -> None:
    """Raises ConnectionError if nothing listens at HOST:PORT: ray.init would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "://" in address:
        return  # auto, local, ray://...: Ray's own business
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"{error}; waited {wait_seconds:g} s (cluster.wait_seconds)") from None
            time.sleep(0.5)


def wait_for_room(config: ClusterConfig) -> None:
    """Waits until the cluster has room for the workers. Raises ClusterError with what was asked and what there is."""
    asked = {"CPU": config.workers * config.cpus_per_worker, "GPU": config.workers * config.gpus_per_worker}
    # A cluster of this machine alone grows no further.
    wait_seconds = config.wait_seconds if cluster_address(config) else min(config.wait_seconds, OWN_CLUSTER_SECONDS)
    deadline = time.monotonic() + wait_seconds
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
        f"waited {wait_seconds:g} s (cluster.wait_seconds)"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
