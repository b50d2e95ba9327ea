"""A Ray cluster of several machines on this one: each node has a network, processes and files of Ray's of its own.

Needs root and iproute2. The nodes' links meet in a bridge; nothing of the machine's own network is touched, and no node
reaches further than to the others and to the bucket.
"""

import contextlib
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


def wires_can_be_laid() -> bool:
    """Whether this machine lets us; tried in a network that is gone at once."""
    if not shutil.which("ip"):
        return False
    attempt = [
        "unshare",
        "--net",
        "--pid",
        "--uts",
        "--mount",
        "--fork",
        "ip",
        "link",
        "add",
        "probe0",
        "type",
        "bridge",
    ]
    return subprocess.run(attempt, capture_output=True).returncode == 0


class Machine(NamedTuple):
    """One node."""

    name: str
    """Of its network namespace, and of its link's end at the bridge."""
    process: subprocess.Popen[bytes]
    init: int
    """Its first process: with it all others end."""

    @property
    def enter(self) -> list[str]:
        """What puts a command on it."""
        return ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount", "--uts", f"--wd={Path.cwd()}"]


class Wires:
    """A bridge that machines are linked to; of the machine below, they reach its address there alone."""

    def __init__(self) -> None:
        mark = os.getpid() % 60_000
        self.net = f"10.{180 + mark // 250 % 70}.{mark % 250}"
        self.host = f"{self.net}.1"
        self._bridge = f"vj{mark}b"
        self._count = 0
        self._machines: list[Machine] = []
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def next_address(self) -> str:
        """Of the machine that is made next."""
        return f"{self.net}.{10 + self._count}"

    def machine(self, script: str, *, log: Path, hostname: str, until: str, env: dict[str, str]) -> Machine:
        """One that runs the script, with a network, processes, mounts and a name of its own, once it has said `until`."""
        address, name = self.next_address(), f"{self._bridge}{self._count}"
        self._count += 1
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", self._bridge, "up")
        for what in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):  # fmt: skip
            _ip("-n", name, *what)
        with log.open("w") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", f"hostname {hostname}\n{script}"],
                stdout=said, stderr=said, env={**os.environ, **env},
            )  # fmt: skip
        try:
            wait_until_says(log, until, process)
        except RuntimeError:
            process.kill()
            process.wait()
            _ip("netns", "del", name)
            raise
        (init,) = psutil.Process(process.pid).children()
        self._machines.append(machine := Machine(name, process, init.pid))
        return machine

    def lose(self, machine: Machine) -> None:
        """As a machine that is switched off."""
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends a node by itself that was given up meanwhile
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

    def remove(self) -> None:
        for machine in list(self._machines):
            self.lose(machine)
        _ip("link", "del", self._bridge)


class Network:
    """As tests.job.nodes.Nodes, but that nodes can also be cut off while they go on."""

    def __init__(self, *, store_port: int, cpus: int = 1) -> None:
        self.wires, self._cpus = Wires(), cpus
        self._count = 0
        self._folder = Path(tempfile.mkdtemp(prefix="net-"))
        self._store = FaultProxy(upstream=store_port, host=self.wires.host).__enter__()
        self.env = {
            "RAY_ADDRESS": f"{self.wires.next_address()}:6379",
            "RAY_AUTH_MODE": "disabled",
            "AWS_ENDPOINT_URL": f"http://{self.wires.host}:{self._store.port}",
            "AWS_ALLOW_HTTP": "true",
            "GLOO_SOCKET_IFNAME": "eth0",
            # How soon a node that does not answer is taken for lost.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._head = started(lambda: self._new("--head --port=6379 --num-cpus=0 --include-dashboard=false"))
        self.enter = self._head.enter
        """What puts a command on the head."""

    def add(self, count: int = 1) -> list[Machine]:
        options = f"--address={self.env['RAY_ADDRESS']} --num-cpus={self._cpus}"
        return [started(lambda: self._new(options)) for _ in range(count)]

    def lose(self, machine: Machine) -> None:
        self.wires.lose(machine)

    def cut(self, machine: Machine) -> None:
        self.wires.cut(machine)

    def silence(self, machine: Machine) -> None:
        self.wires.silence(machine)

    def heal(self, machine: Machine) -> None:
        self.wires.heal(machine)

    def shutdown(self) -> None:
        self.wires.remove()
        self._store.__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self, options: str) -> Machine:
        folder = self._folder / str(self._count)
        self._count += 1
        folder.mkdir()
        ray = Path(sys.executable).parent / "ray"
        script = f"""
            mkdir -p /tmp/ray; mount --bind {folder} /tmp/ray; mount -t tmpfs -o size=2g tmpfs /dev/shm
            {ray} start {options} --node-ip-address={self.wires.next_address()} --object-store-memory=150000000 \
              --disable-usage-stats --block
        """
        return self.wires.machine(
            script, log=folder / "log", hostname=f"n{self._count}", until="Ray runtime started", env=self.env
        )


def wait_until_says(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + NODE_SECONDS
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
