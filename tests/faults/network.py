"""A Ray cluster of several machines on this one: each node has a network, processes and files of Ray's of its own.

Needs root and iproute2. The nodes' links meet in a bridge; nothing of the machine's own network is touched, and no node
reaches further than to the others and to the bucket.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.job.nodes import started
from tests.s3.faultproxy import FaultProxy

NODE_SECONDS = 180


class Machine(NamedTuple):
    """One node."""

    name: str
    """Of its network namespace, and of its link's end at the bridge."""
    process: subprocess.Popen[bytes]
    init: int
    """Its first process: with it all others end."""


class Network:
    """As tests.job.nodes.Nodes, but that nodes can also be cut off while they go on."""

    def __init__(self, *, store_port: int) -> None:
        mark = os.getpid() % 60_000
        self._net = f"10.{180 + mark // 250 % 70}.{mark % 250}"
        self._bridge = f"vj{mark}b"
        self._count = 0
        self._folder = Path(tempfile.mkdtemp(prefix="net-"))
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        self._store = FaultProxy(upstream=store_port, host=f"{self._net}.1").__enter__()
        self._machines: list[Machine] = []
        self.env = {
            "RAY_ADDRESS": f"{self._net}.10:6379",
            "RAY_AUTH_MODE": "disabled",
            "AWS_ENDPOINT_URL": f"http://{self._net}.1:{self._store.port}",
            "AWS_ALLOW_HTTP": "true",
            "GLOO_SOCKET_IFNAME": "eth0",
            # How soon a node that does not answer is taken for lost.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._head = started(lambda: self._new("--head --port=6379 --num-cpus=0 --include-dashboard=false"))
        self.enter = ["nsenter", f"--target={self._head.init}", "--net", "--pid", "--mount", f"--wd={Path.cwd()}"]
        """What puts a command on the head."""

    def add(self, count: int = 1) -> list[Machine]:
        return [started(lambda: self._new(f"--address={self.env['RAY_ADDRESS']} --num-cpus=1")) for _ in range(count)]

    def lose(self, machine: Machine) -> None:
        """As a machine that is switched off."""
        psutil.Process(machine.init).kill()
        machine.process.wait()
        _ip("netns", "del", machine.name)  # the link goes with it
        self._machines.remove(machine)

    def cut(self, machine: Machine) -> None:
        """The cable is pulled: both ends see it."""
        _ip("link", "set", machine.name, "down")

    def silence(self, machine: Machine) -> None:
        """Its link stays up, and nothing passes."""
        _ip("link", "set", machine.name, "nomaster")

    def heal(self, machine: Machine) -> None:
        _ip("link", "set", machine.name, "master", self._bridge, "up")

    def shutdown(self) -> None:
        for machine in list(self._machines):
            self.lose(machine)
        self._store.__exit__()
        _ip("link", "del", self._bridge)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self, options: str) -> Machine:
        number = self._count
        self._count += 1
        name, address = f"{self._bridge}{number}", f"{self._net}.{10 + number}"
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", self._bridge, "up")
        for what in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):  # fmt: skip
            _ip("-n", name, *what)
        folder = self._folder / str(number)
        folder.mkdir()
        ray = Path(sys.executable).parent / "ray"
        script = f"""
            mkdir -p /tmp/ray; mount --bind {folder} /tmp/ray; mount -t tmpfs -o size=2g tmpfs /dev/shm
            {ray} start {options} --node-ip-address={address} --object-store-memory=150000000 --disable-usage-stats --block
        """
        log = folder / "log"
        with log.open("w") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
                stdout=said, stderr=said, env={**os.environ, **self.env},
            )  # fmt: skip
        try:
            wait_until_says(log, "Ray runtime started", process)
        except RuntimeError:
            process.kill()
            process.wait()
            _ip("netns", "del", name)
            raise
        (init,) = psutil.Process(process.pid).children()
        self._machines.append(machine := Machine(name, process, init.pid))
        return machine


def wait_until_says(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + NODE_SECONDS
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
