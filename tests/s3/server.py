"""The S3 server that tests talk to: Ceph's radosgw where it is installed, else moto's, each as real processes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY, SECRET_KEY = "vaejobtest", "vaejobsecret"
HOW_TO_INSTALL = "apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-base ceph-common"
_SCRIPT = Path(__file__).with_name("ceph_rgw.sh")
_CEPH = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")


class S3Server(NamedTuple):
    kind: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach this server, and nothing else, by the standard variables."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # radosgw refuses the trailing checksums that boto3 sends by default
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        }

    @contextlib.contextmanager
    def as_environment(self) -> Iterator[None]:
        """This process, and those it starts, talk to this server."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def which_server() -> str | None:
    """'ceph', 'moto', or None if neither is installed."""
    if all(shutil.which(program) for program in _CEPH):
        return "ceph"
    return "moto" if find_spec("moto") and find_spec("flask_cors") else None


@contextlib.contextmanager
def running(kind: str, folder: Path) -> Iterator[S3Server]:
    """The server, with its files in a folder that is gone afterwards; it ends with this process, however that ends."""
    with {"ceph": _ceph, "moto": _moto}[kind](folder) as server:
        _wait_until_it_answers(server)
        yield server


@contextlib.contextmanager
def _ceph(folder: Path) -> Iterator[S3Server]:
    s3_port, mon_port = _free_ports(2)
    environment = {**os.environ, "AK": ACCESS_KEY, "SK": SECRET_KEY}
    folder.mkdir(parents=True)
    watch = [_SCRIPT, "watch", folder, str(os.getpid())]
    watcher = subprocess.Popen(watch, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        start = [_SCRIPT, "start", folder, str(s3_port), str(mon_port)]
        result = subprocess.run(start, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"radosgw did not start: {result.stderr}{_last_lines(folder / 'log')}")
        yield S3Server("ceph", s3_port)
    finally:
        watcher.kill()
        watcher.wait()
        subprocess.run([_SCRIPT, "stop", folder], check=True)


@contextlib.contextmanager
def _moto(folder: Path) -> Iterator[S3Server]:
    (port,) = _free_ports(1)
    folder.mkdir(parents=True)
    with (folder / "moto.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield S3Server("moto", port)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def client(server: S3Server) -> Any:
    """A boto3 client: a second way to the same bytes."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, request_checksum_calculation="when_required", read_timeout=20),
    )


def _wait_until_it_answers(server: S3Server) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client(server).list_buckets()
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{server.kind} on port {server.port} does not answer") from error
            time.sleep(0.1)
        else:
            return


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _last_lines(logs: Path) -> str:
    ends = (f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in sorted(logs.glob("*.out")))
    return "\n".join(["", *ends])
