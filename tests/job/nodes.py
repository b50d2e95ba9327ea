"""A Ray cluster of several nodes on this machine, which come and go."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vaejob.storage import open_bucket
from vaejob.storage.runs import recorded_images


class Nodes:
    """The head has no room for workers, each further node for one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = started(
            lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        )
        self.address = str(self._cluster.address)
        self.enter: list[str] = []
        self.env = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}

    def add(self, count: int = 1) -> list[Any]:
        return [started(lambda: self._cluster.add_node(num_cpus=1)) for _ in range(count)]

    def lose(self, node: Any) -> None:
        """As a machine that is switched off: everything on it is gone at once."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, *, seconds: int) -> None:
        """The notice that the node will be taken back."""
        command = [
            str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={self.address}", f"--node-id={node.node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def started(start: Callable[[], Any]) -> Any:
    """What it returns; Ray gives a node 30 s to start, which a busy machine may need several times."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@contextmanager
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Job:
    """A `vaejob train` in a process of its own, whose output is kept."""

    def __init__(self, *arguments: object, env: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vaejob", "train", *map(str, arguments)],
                stdout=file,
                stderr=file,
                env={**os.environ, **env},
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, what: Callable[[], object], *, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def wait_until_says(self, text: str, *, seconds: float = 300) -> None:
        self.wait_until(lambda: text in self.said, seconds=seconds)

    def wait_for_checkpoint(self, run: Path, *, after: int = 0) -> int:
        self.wait_until(lambda: [images for images in recorded_images(open_bucket(str(run))) if images > after])
        return recorded_images(open_bucket(str(run)))[-1]

    def ends(self, *, seconds: float = 300) -> int:
        return self.process.wait(timeout=seconds)


def worker_processes() -> list[psutil.Process]:
    """Of Ray Train, whichever cluster of this machine they belong to."""
    return [process for process in psutil.process_iter(["name"]) if "RayTrainWorker" in process.info["name"]]


def wait_for(what: Callable[[], object], *, seconds: float, said: Callable[[], str]) -> None:
    """said: what is shown if it does not come."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)
