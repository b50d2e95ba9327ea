"""Whole jobs as a user runs them: real processes, a real Ray cluster, real digits."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.s3.server import S3Server
from vaejob.config import JobConfig, parse_config

ROOT = Path(__file__).parents[2]

DIGITS_JOB = """
run: {{name: run, bucket: {bucket}}}
data: {{train: {digits}/train, test: {digits}/test, global_batch: 64, lanes: 6, window_rows: 64}}
model: {{family: mlp, latent: 8, hidden: [64, 64]}}
likelihood: {{pixels: discretized-logistic, bits: 4}}
training: {{images: 6000, report_every_images: 1, evaluate_every_images: 3000}}
checkpoint: {{every_images: 500}}
cluster: {{workers: 0, wait_seconds: 30}}
"""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """scikit-learn's digits, packed as the quickstart packs them, in row groups small enough to be many."""
    return pack_digits(str(tmp_path_factory.mktemp("digits")))


def pack_digits(address: str) -> str:
    """1,797 digits of 8x8 pixels, the fifth part of them in the test split; the address again."""
    from sklearn.datasets import load_digits

    from vaejob.data.pack import pack
    from vaejob.data.sources import ArraySource

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype("uint8")[:, None]
    source = ArraySource("digits", images, [f"digit-{index:04d}" for index in range(len(images))])
    pack(source, address, split="train=0.8,test=0.2", row_group_bytes=6400, shard_bytes=32000)
    return address


@pytest.fixture(scope="session")
def digits_npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same digits as a file that people have: an npz of uint8 pictures."""
    import numpy as np
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("npz") / "digits.npz"
    np.savez(path, images=(load_digits().images * (255 / 16)).round().astype("uint8"))
    return str(path)


@pytest.fixture
def job_file(tmp_path: Path, digits: str) -> Path:
    """A small job on the digits, whose run is tmp_path/runs/run."""
    path = tmp_path / "job.yaml"
    path.write_text(DIGITS_JOB.format(bucket=tmp_path / "runs", digits=digits))
    return path


@pytest.fixture
def job(job_file: Path) -> JobConfig:
    return parse_config(job_file.read_text())


Vaejob = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def vaejob() -> Vaejob:
    """Runs a verb in a process of its own."""

    def run(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vaejob", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, check=False
        )

    return run


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, s3_env: S3Server) -> Iterator[dict[str, str]]:
    """A Ray cluster as an operator starts it, with room for 4 one-core workers; its addresses as environment."""
    with a_head(tmp_path_factory.mktemp("ray") / "head.log", {"RAY_AUTH_MODE": "disabled"}) as head:
        yield head


@contextmanager
def a_head(log_file: Path, authentication: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same, with who may use it."""
    # Ray's sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="vaejob-ray-", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        **authentication,
        "PORT": str(port),
        "DASHBOARD_PORT": str(dashboard),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = log_file.open("w")
    # The agent's port is fixed unless it is given: a second cluster on the machine would have no agent for jobs.
    agent = f"--dashboard-agent-listen-port={free_port()}"
    options = [
        agent,
        "--num-cpus=4",
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={folder}",
        "--object-store-memory=200000000",
    ]
    head = subprocess.Popen(
        ["deploy/ray-node.sh", "head", *options], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
    )
    try:
        token = authentication.get("RAY_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        jobs = urllib.request.Request(f"http://127.0.0.1:{dashboard}/api/jobs/", headers=headers)
        wait_until_answers(jobs, head, log_file)
        yield {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            **authentication,
        }
    finally:
        kill_tree(head.pid)
        head.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


class IdleCluster:
    """The Jobs API of a cluster without jobs."""

    def __init__(self, ray: str = version("ray")) -> None:
        self._ray = ray

    def _do_request(self, method: str, path: str) -> "IdleCluster":
        assert (method, path) == ("GET", "/api/version")
        return self

    def json(self) -> dict[str, str]:
        return {"version": "4", "ray_version": self._ray}

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[object]:
        return []


def picture_size(path: Path | str) -> tuple[int, int]:
    """Of a picture that opens and decodes."""
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that descend from it, parents first so that nothing is started anew."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [parent, *parent.children(recursive=True)]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_answers(url: str | urllib.request.Request, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                json.load(answer)
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(f"no cluster after 120 s: {log.read_text()}")
