"""Secrets are planted wherever a job may meet them; then everything that it wrote, said or showed is searched."""

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from tests.job.conftest import DIGITS_JOB, IdleCluster, Vaejob, pack_digits
from tests.s3.server import S3Server, client
from vaejob.cluster.jobs import submit_job
from vaejob.config import JobConfig, parse_config
from vaejob.storage import open_bucket

HIDDEN_FROM_ALL = ("HF_TOKEN", "GITHUB_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "DB_PASSWORD")

GRPC: Any = gcs_service_pb2_grpc  # generated, and untyped
MESSAGES: Any = gcs_service_pb2

OF_TORCH = "torchinductor_"
"""What torch alone makes, under the umask, unless TORCHINDUCTOR_CACHE_DIR names another place."""


def planted(*more: str) -> dict[str, str]:
    """Environment variables with a new secret in each."""
    return {name: f"hf_{secrets.token_hex(20)}" for name in (*HIDDEN_FROM_ALL, *more)}


@dataclass
class Watched:
    """What others on the machine could see of a job while it ran."""

    folder: Path
    """The TMPDIR it was given, open to everybody as /tmp is."""
    token: str = ""
    """Of its Ray cluster."""
    answers: list[grpc.StatusCode] = field(default_factory=list)
    """Of the cluster's head: to a caller without a token, with a wrong one, and with the right one."""
    open_to_others: set[str] = field(default_factory=set)
    command_lines: set[str] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)

    def look(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                self.command_lines.add(" ".join(line))
                address = next((word for word in line if word.startswith("--gcs-address=")), None)
                if address and str(self.folder) in " ".join(line) and not self.answers:
                    self.token = process.environ()["RAY_AUTH_TOKEN"]
                    self.answers = [self._ask(address, token) for token in (None, "0" * 64, self.token)]
        self._look_into(self.folder, reachable=True)

    def _ask(self, address: str, token: str | None) -> grpc.StatusCode:
        """For the nodes of the cluster, as everyone who joins it does first."""
        with grpc.insecure_channel(address.partition("=")[2]) as channel:
            nodes = GRPC.NodeInfoGcsServiceStub(channel)
            headers = [("authorization", f"Bearer {token}")] if token else []
            try:
                nodes.GetAllNodeInfo(MESSAGES.GetAllNodeInfoRequest(), metadata=headers, timeout=20)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    def _look_into(self, folder: Path, *, reachable: bool) -> None:
        """Notes what other users can reach, and keeps every file that has changed."""
        with suppress(FileNotFoundError):
            for path in folder.iterdir():
                status = path.lstat()
                if reachable and not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o077:
                    self.open_to_others.add(f"{stat.filemode(status.st_mode)} {path}")
                if stat.S_ISDIR(status.st_mode):
                    self._look_into(path, reachable=reachable and bool(status.st_mode & 0o011))
                elif stat.S_ISREG(status.st_mode) and status.st_size != len(self.files.get(path, b"")):
                    self.files[path] = path.read_bytes()


@dataclass
class Run:
    """A job that is done: its secrets, where it is, what it said."""

    secrets: dict[str, str]
    address: str
    home: Path
    said: str
    watched: Watched


@pytest.fixture(scope="module")
def run(s3_env: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two workers of a Ray cluster of their own, under a umask that hides nothing, with images and run in a real bucket."""
    name = f"vaejob-{secrets.token_hex(6)}"
    client(s3_env).create_bucket(Bucket=name)
    home, address = tmp_path_factory.mktemp("home"), f"s3://{name}"
    pack_digits(f"{address}/digits")
    (home / "job.yaml").write_text(DIGITS_JOB.format(bucket=f"{address}/runs", digits=f"{address}/digits"))
    hidden = planted()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | hidden
    watched = Watched(Path(f"/tmp/vj-{secrets.token_hex(4)}"))  # sockets need a short path
    watched.folder.mkdir()
    watched.folder.chmod(0o1777)
    settings = ["cluster.workers=2", f"data.cache_dir={watched.folder}/cache"]
    with (home / "log").open("w+") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "vaejob", "train", home / "job.yaml", *settings],
            env=environment | {"TMPDIR": str(watched.folder)}, stdout=log, stderr=log, umask=0,
        )  # fmt: skip
        while job.poll() is None:
            watched.look()
            time.sleep(0.2)
        watched.look()
    said = (home / "log").read_text()
    assert job.returncode == 0, said
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    yield Run(hidden | keys, f"{address}/runs/run", home, said, watched)
    shutil.rmtree(watched.folder)


def found(hidden: dict[str, str], text: str | bytes) -> list[str]:
    """Names of the secrets that a text holds."""
    data = text.encode() if isinstance(text, str) else text
    return [name for name, secret in hidden.items() if secret.encode() in data]


@pytest.mark.ray
@pytest.mark.s3
class TestOfARun:
    def test_nothing_in_its_bucket_holds_a_secret(self, run: Run) -> None:
        bucket = open_bucket(run.address)
        keys = bucket.keys()
        kinds = {key.split("/")[0] for key in keys}
        assert {"job.yaml", "attempts", "states", "records", "metrics", "pictures", "report.html"} <= kinds
        assert {key: names for key in keys if (names := found(run.secrets, bucket.read(key)))} == {}

    def test_neither_its_output_nor_its_files_hold_a_secret(self, run: Run) -> None:
        assert "6,000 of 6,000 images" in run.said
        assert found(run.secrets, run.said) == []
        logs = [path for path in run.watched.files if path.suffix in (".log", ".out", ".err")]
        assert any("raylet" in path.name for path in logs)
        secrets_and_token = run.secrets | {"token": run.watched.token}
        files = {str(path): found(secrets_and_token, data) for path, data in run.watched.files.items()}
        assert {path: names for path, names in files.items() if names} == {}

    def test_no_command_line_holds_a_secret(self, run: Run) -> None:
        assert any("raylet" in line for line in run.watched.command_lines)
        assert any("ray::" in line for line in run.watched.command_lines)
        assert len(run.watched.token) == 64
        for line in run.watched.command_lines:
            assert found(run.secrets | {"token": run.watched.token}, line) == []

    def test_its_cluster_refuses_who_has_no_token(self, run: Run) -> None:
        refused = grpc.StatusCode.UNAUTHENTICATED
        assert run.watched.answers == [refused, refused, grpc.StatusCode.OK]

    def test_other_users_reach_none_of_its_temporary_files(self, run: Run) -> None:
        """Though the umask was 0; what was there at some moment counts, not only what is left."""
        tops = {path.relative_to(run.watched.folder).parts[0] for path in run.watched.files}
        assert "cache" in tops
        assert any(top.startswith("vaejob-") for top in tops)  # of Ray
        known = f"drwxrwxrwx {run.watched.folder}/{OF_TORCH}"
        assert {line for line in run.watched.open_to_others if not line.startswith(known)} == set()

    def test_nothing_of_its_cluster_is_left(self, run: Run) -> None:
        left = [path.name for path in run.watched.folder.iterdir() if not path.name.startswith(OF_TORCH)]
        assert left == ["cache"]

    def test_what_is_made_of_it_holds_no_secret(self, run: Run, vaejob: Vaejob) -> None:
        out, page = run.home / "export", run.home / "report.html"
        said = ""
        for arguments in (
            ("export", run.address, "--out", out),
            ("report", run.address, "--out", page),
            ("show", run.address, "--json"),
            ("resume", run.address, "training.images=6064", "cluster.workers=0"),
        ):
            done = vaejob(*map(str, arguments), env=run.secrets)
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
        assert found(run.secrets, said) == []
        files = [path for path in (*out.rglob("*"), page) if path.is_file()]
        assert len(files) >= 5
        assert {path.name: names for path in files if (names := found(run.secrets, path.read_bytes()))} == {}


def test_job_in_a_folder_writes_no_secret(vaejob: Vaejob, job_file: Path, tmp_path: Path) -> None:
    """With keys of a store that it does not need, temporary ones too, and endpoints."""
    hidden = planted("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    done = vaejob("train", str(job_file), env=hidden)
    assert done.returncode == 0, done.stderr
    assert found(hidden, done.stdout + done.stderr) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".yaml", ".json", ".safetensors", ".parquet", ".png", ".html"}
    assert {str(path): names for path in files if (names := found(hidden, path.read_bytes()))} == {}


def test_address_with_a_login_ends_in_one_line_and_nothing_is_written(
    vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    secret, before = secrets.token_hex(20), sorted(tmp_path.rglob("*"))
    place = f"s3://AKIAIOSFODNN7EXAMPLE:{secret}@models"
    for what, *arguments in (
        ("run.bucket holds a password", "train", job_file, f"run.bucket={place}"),
        ("data.train holds a password", "train", job_file, f"data.train={place}/digits"),
        ("s3://***@models carries a login", "train", f"{place}/job.yaml"),
        ("s3://***@models/run carries a login", "resume", f"{place}/run"),
        ("run.bucket holds a password", "submit", job_file, f"run.bucket={place}", "--address", "http://127.0.0.1:1"),
        ("s3://***@models carries a login", "pack", f"{place}/photos.zip", tmp_path / "packed"),
    ):
        done = vaejob(*map(str, arguments))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"vaejob: {what}")
        assert secret not in done.stdout + done.stderr
        assert "AKIA" not in done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_endpoint_with_a_password_is_not_repeated(vaejob: Vaejob, job_file: Path) -> None:
    secret = secrets.token_hex(20)
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": secret}
    for endpoint in (f"https://me:{secret}@minio.example", f"https://minio.example/?X-Amz-Signature={secret}"):
        done = vaejob("train", str(job_file), "run.bucket=s3://models", env=keys | {"AWS_ENDPOINT_URL": endpoint})
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("vaejob: AWS_ENDPOINT_URL carries a login or a signature")
        assert secret not in done.stdout + done.stderr


class Recorder(IdleCluster):
    """Takes a job in the place of a cluster, with all the files that travel along."""

    def submit_job(self, **settings: Any) -> str:
        self.settings = settings
        folder = Path(settings["runtime_env"]["working_dir"])
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return "job"


def test_submitted_job_carries_no_secret(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray shows a job's settings and environment to everyone who sees its dashboard."""
    hidden = planted("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
    for name, secret in hidden.items():
        monkeypatch.setenv(name, secret)
    cluster: Any = Recorder()
    assert submit_job(job, cluster) == "job"
    assert found(hidden, json.dumps(cluster.settings)) == []
    assert parse_config(cluster.files["job.yaml"].decode()).run == job.run
    assert {name: names for name, data in cluster.files.items() if (names := found(hidden, data))} == {}


@pytest.mark.parametrize("target", ["kuberay", "slurm", "ray-up", "skypilot"])
def test_rendered_manifests_hold_no_secret(target: str, vaejob: Vaejob, tmp_path: Path) -> None:
    hidden = planted("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
    example = Path(__file__).parents[2] / "deploy/example-job.yaml"
    done = vaejob("render", target, str(example), "--out", str(tmp_path / "out"), env=hidden)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    assert found(hidden, done.stdout + done.stderr + "".join(path.read_text() for path in files)) == []
