"""What KubeRay makes of a rendered RayJob, as processes of this machine: its pods' own commands, without the pods.

Read in KubeRay 1.7: the operator makes `ray start` of rayStartParams and of the container's limits, adds the token and the
address of the head to every pod, hands the command in by a shell script that may run twice, and answers a failed attempt with
a new cluster and a new submission. Ports are the machine's to share, so each pod has its own where a real one has an address.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.job.conftest import free_port, kill_tree, wait_until_answers

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class RayJob:
    """A rendered folder that was applied: `attempt` brings up what KubeRay would, until one has succeeded."""

    def __init__(self, rendered: Path, *, secret: Mapping[str, str], folder: Path) -> None:
        objects = [yaml.safe_load(path.read_text()) for path in sorted(rendered.glob("*.yaml"))]
        by_kind = {each["kind"]: each for each in objects}
        self.spec: dict[str, Any] = by_kind["RayJob"]["spec"]
        self._secret, self._folder = dict(secret), folder
        self._name: str = by_kind["RayJob"]["metadata"]["name"]
        self._config = folder / "config"
        self._config.mkdir(parents=True)
        for name, text in by_kind["ConfigMap"]["data"].items():
            (self._config / name).write_text(text)

    def attempt(self, number: int) -> "Attempt":
        assert number <= self.spec["backoffLimit"]
        return Attempt(
            self.spec, self._config, self._secret, self._folder / f"attempt-{number}", f"{self._name}-{number}"
        )


class Attempt:
    """One RayCluster, its submitter, and the job's state in it."""

    def __init__(
        self, spec: dict[str, Any], config: Path, secret: Mapping[str, str], folder: Path, submission: str
    ) -> None:
        folder.mkdir()
        self._spec, self._config, self._secret, self._folder = spec, config, secret, folder
        self.submission = submission
        self._token = secrets.token_hex(32)  # authOptions.mode: token
        self._gcs, self._dashboard = free_port(), free_port()
        self._ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
        cluster = spec["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        self.head = self._pod("head", cluster["headGroupSpec"], {
            "head": None, "port": self._gcs, "dashboard-port": self._dashboard, "temp-dir": self._ray_folder,
            "include-dashboard": "true",
        })  # fmt: skip
        wait_until_answers(self._jobs(), self.head, self._folder / "head.log")
        (group,) = cluster["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        self.workers = [self._worker(number, group) for number in range(group["replicas"])]
        for number in range(len(self.workers)):  # a cluster is ready, and is submitted to, once all of it is
            while "Ray runtime started" not in (said := (self._folder / f"worker-{number}.log").read_text()):
                if self.workers[number].poll() is not None:  # a pod that ended is replaced
                    assert "timed out during startup" in said, said
                    self.workers[number] = self._worker(number, group)
                time.sleep(0.2)
        self.submitter = self._submit()

    def said(self) -> str:
        """What `kubectl logs` shows of the submitter's pod."""
        return (self._folder / "submitter.log").read_text()

    def wait_for_end(self, *, seconds: float) -> str:
        """The status of the job."""
        deadline = time.monotonic() + seconds
        while (status := self._status()) not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < deadline, self.said()
            time.sleep(1)
        self.submitter.wait(60)
        return status

    def lose_head(self) -> None:
        """SIGKILL to all of its pod; the pods of workers go on, and find out by themselves."""
        kill_tree(self.head.pid)
        self.head.wait()

    def delete(self) -> None:
        """As the operator deletes a RayCluster: SIGTERM to each pod, SIGKILL once its grace is over, or at once here."""
        pods = [self.submitter, *self.workers, self.head]
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGTERM)
        for pod in pods:
            kill_tree(pod.pid)
            pod.wait()
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _worker(self, number: int, group: dict[str, Any]) -> "subprocess.Popen[bytes]":
        return self._pod(f"worker-{number}", group, {"address": f"127.0.0.1:{self._gcs}"})

    def _pod(self, name: str, group: dict[str, Any], own: dict[str, Any]) -> "subprocess.Popen[bytes]":
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        options = {
            "num-cpus": limits["cpu"],
            "memory": int(float(limits["memory"][:-2]) * UNITS[limits["memory"][-2:]]),
            **({"num-gpus": limits["nvidia.com/gpu"]} if "nvidia.com/gpu" in limits else {}),
            **group["rayStartParams"],
            **own,
            "metrics-export-port": free_port(),
            "dashboard-agent-listen-port": free_port(),
            "node-ip-address": "127.0.0.1",
            "object-store-memory": 150_000_000,
            "block": None,
        }
        flags = " ".join(
            f"--{key}" if value is None else f"--{key}={shlex.quote(str(value))}" for key, value in options.items()
        )
        return self._process(name, container, f"ulimit -n 65536; ray start {flags}")

    def _submit(self) -> "subprocess.Popen[bytes]":
        (container,) = self._spec["submitterPodTemplate"]["spec"]["containers"]
        address, job = f"--address http://127.0.0.1:{self._dashboard}", self.submission
        metadata = shlex.quote(json.dumps(self._spec["metadata"]))
        entrypoint = self._spec["entrypoint"].replace("/etc/vaejob/", f"{self._config}/")
        return self._process("submitter", container, (
            f"if ! ray job status {address} {job} >/dev/null 2>&1 ; then ray job submit {address} --no-wait "
            f"--metadata-json {metadata} --submission-id {job} -- {entrypoint} ; fi ; "
            f"ray job logs {address} --follow {job}"
        ))  # fmt: skip

    def _process(self, name: str, container: dict[str, Any], script: str) -> "subprocess.Popen[bytes]":
        """A container: its own environment, and nothing of ours but what finds programs."""
        kept = {key: os.environ[key] for key in ("LANG", "TMPDIR") if key in os.environ}
        env = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            **{each["name"]: each["value"] for each in container.get("env", [])},
            **(self._secret if "envFrom" in container else {}),
        }
        with (self._folder / f"{name}.log").open("w") as log:
            command = ["/bin/bash", "-ce" if name == "submitter" else "-c", "--", script]
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=self._folder)

    def _jobs(self, job: str = "") -> urllib.request.Request:
        url = f"http://127.0.0.1:{self._dashboard}/api/jobs/{job}"
        return urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"})

    def _status(self) -> str:
        try:
            with urllib.request.urlopen(self._jobs(self.submission), timeout=30) as answer:
                return str(json.load(answer)["status"])
        except urllib.error.HTTPError as error:
            if error.code != 404:  # it is not handed in yet
                raise
            return "PENDING"
