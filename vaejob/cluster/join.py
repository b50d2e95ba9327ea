"""Joins a Ray cluster, or starts one on this machine, and waits until it has room."""

import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from vaejob.config import ClusterConfig
from vaejob.errors import ClusterError

HEALTH_CHECK_SECONDS = 0.5
DRAIN_CHECK_SECONDS = 1.0
OWN_CLUSTER_SECONDS = 5.0
STARTS_OF_A_NODE = 4
SHARED_MEMORY = Path("/dev/shm")
LONGEST_FOLDER = 41
"""Bytes: Ray puts sockets below its folder, and their paths end at 107."""


class StopAsked(Exception):  # noqa: N818 - not an error
    """The job was asked to stop before it had workers."""


def _never() -> bool:
    return False


def cluster_address(config: ClusterConfig) -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS")


def placement_seconds(config: ClusterConfig) -> int:
    """How long Ray Train waits for the places of a group: an elastic one is then tried with what there is by then."""
    return 25 if config.elastic else 60


@contextmanager
def cluster_of(config: ClusterConfig, *, should_stop: Callable[[], bool] = _never) -> Iterator[None]:
    """The cluster of the settings or of RAY_ADDRESS; without either one on this machine, for as long as the job.

    Raises ClusterError if there is none, StopAsked.
    """
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_SECONDS),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(placement_seconds(config)),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": str(DRAIN_CHECK_SECONDS),
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    address = cluster_address(config)
    try:
        if address:
            _refuse_silent(address, wait_seconds=config.wait_seconds, should_stop=should_stop)
        with _there(address) if address else _here() as where, _connected(where):
            if should_stop():
                raise StopAsked
            yield
    except _NotConnected as failure:
        raise ClusterError(
            f"no Ray cluster could be reached at {address or 'this machine'}: {first_line(failure)}"
        ) from failure


class _NotConnected(Exception):  # noqa: N818 - becomes a ClusterError
    """Ray's own reason."""


@contextmanager
def _there(address: str) -> Iterator[dict[str, Any]]:
    """How to join a cluster that another has started, and may have given a token."""
    yield {"address": address}


@contextmanager
def _here() -> Iterator[dict[str, Any]]:
    """How to start a cluster of this user alone: a folder that no other may enter, and a token that it asks everybody for.

    The folder, where Ray's logs are, stays if the job fails.
    """
    if SHARED_MEMORY.is_dir() and not os.access(SHARED_MEMORY, os.W_OK):
        raise _NotConnected(  # Ray's node would not start, and not say why
            f"{SHARED_MEMORY}, where Ray keeps what its processes share, may not be written by this user; in a container, "
            "mount a tmpfs there whose mode is 1777"
        )
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(f"{parent}/vaejob-xxxxxxxx/r")) > LONGEST_FOLDER:
        parent = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="vaejob-", dir=parent))
    with _own_token(), _loopback():
        # Ray opens its own folder to everybody; the one above it stays closed.
        yield {"address": "local", "include_dashboard": False, "_temp_dir": str(folder / "r")}
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _loopback() -> Iterator[None]:
    """Ray's nodes listen at 127.0.0.1 alone, and no address of this machine is looked for, which takes a network."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_token() -> Iterator[None]:
    """A new token in the environment of this process and of all that Ray starts; RAY_AUTH_MODE=disabled is heeded."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        yield
        return
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    _read_environment_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _read_environment_again()


def _read_environment_again() -> None:
    """Ray reads it when it is imported, and keeps the first token that it finds."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _connected(where: dict[str, Any]) -> Iterator[None]:
    """Ray, joined and left by a thread of its own, which keeps Ray's hands off the signal handlers of the main thread.

    The thread stays as long as the cluster: the processes of one on this machine die with the thread that started them.
    """
    joined, leave = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def hold() -> None:
        # Whatever log_to_driver says, Ray prints to stdout how workers and nodes end; its own log files have that too.
        ray_worker._worker_logs_enabled = False
        try:
            _init(where)
        except BaseException as error:
            failures.append(error)
        joined.set()
        leave.wait()
        ray.shutdown()

    holder = threading.Thread(target=hold, name="ray", daemon=True)
    holder.start()
    try:
        joined.wait()
        if failures:
            raise _NotConnected(first_line(failures[0])) from failures[0]
        yield
    finally:
        leave.set()
        holder.join()


def _init(where: dict[str, Any]) -> None:
    """Ray gives a node of its own 30 seconds to start, which are too few where a machine is busy with other things."""
    for start in range(1, STARTS_OF_A_NODE + 1):
        try:
            ray.init(
                **where, namespace="vaejob", log_to_driver=False, logging_level=logging.ERROR, configure_logging=True
            )
            return
        except Exception as error:
            if start == STARTS_OF_A_NODE or "timed out during startup" not in str(error):
                raise


def _refuse_silent(address: str, *, wait_seconds: float, should_stop: Callable[[], bool]) -> None:
    """Raises _NotConnected if nothing listens at HOST:PORT: ray.init would go on trying for minutes. Or StopAsked."""
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
                raise _NotConnected(f"{error}; waited {wait_seconds:g} s (cluster.wait_seconds)") from None
            if should_stop():
                raise StopAsked from None
            time.sleep(0.5)


def wait_for_room(
    config: ClusterConfig,
    *,
    should_stop: Callable[[], bool] = _never,
    on_wait: Callable[[str], None] = lambda line: None,
) -> None:
    """Waits until the cluster has room for the least number of workers; on_wait hears once if there is none at first.

    Raises ClusterError with what was asked and what there is, StopAsked.
    """
    workers = config.least_workers
    asked = {"CPU": workers * config.cpus_per_worker, "GPU": workers * config.gpus_per_worker}
    # A cluster of this machine alone grows no further.
    wait_seconds = config.wait_seconds if cluster_address(config) else min(config.wait_seconds, OWN_CLUSTER_SECONDS)
    deadline = time.monotonic() + wait_seconds
    told = False
    while not _has_room(asked):
        if not told:
            on_wait(f"waiting at most {wait_seconds:g} s for room: the workers {_asked_and_there(config, asked)}")
            told = True
        if should_stop():
            raise StopAsked
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"cluster.workers is {json.dumps(config.workers)}: they {_asked_and_there(config, asked)}; "
                f"waited {wait_seconds:g} s (cluster.wait_seconds)"
            )
        time.sleep(0.5)


def _has_room(asked: dict[str, int]) -> bool:
    free = _free()
    return all(free.get(kind, 0) >= number for kind, number in asked.items())


def _asked_and_there(config: ClusterConfig, asked: dict[str, int]) -> str:
    free, there = _free(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    wants = " and ".join(f"{number} {kind}s" for kind, number in asked.items() if number)
    has = " and ".join(f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in asked)
    nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
    least = " at least" if config.elastic else ""
    return f"ask for {wants}{least}, the cluster has {has} on {nodes} nodes"


def _free() -> dict[str, float]:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
