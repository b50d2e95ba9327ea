"""The same job on a cluster that an operator started, by Ray's Jobs API."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.job.conftest import IdleCluster, Vaejob, a_head
from vaejob.cluster.jobs import follow_job, submit_job
from vaejob.config import JobConfig
from vaejob.errors import ClusterError
from vaejob.storage import open_bucket
from vaejob.storage.runs import newest_record, recorded_images


class LineThatBreaks:
    """A cluster's Jobs API that goes away while it is listened to."""

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield f"{job_id} begins\n"
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_a_line_that_breaks_is_no_fault_of_ours() -> None:
    said: list[str] = []
    with pytest.raises(ClusterError, match=r"closed unexpectedly .*; the job may go on there: look again"):
        follow_job("job", LineThatBreaks(), write=said.append)  # type: ignore[arg-type]
    assert said == ["job begins\n"]


def test_a_cluster_of_another_ray_is_refused(job: JobConfig) -> None:
    with pytest.raises(ClusterError, match=r"the cluster at http://head:8265 runs Ray 2.55.1; this vaejob needs 2.60"):
        submit_job(job, IdleCluster("2.55.1"))  # type: ignore[arg-type]


def test_a_package_that_holds_more_than_its_own_is_refused(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaejob.cluster.jobs.MOST_BYTES", 1 << 20)
    with pytest.raises(ClusterError, match=r"/vaejob holds \d+ MiB, of which a cluster takes 1: take out what is not"):
        submit_job(job, IdleCluster())  # type: ignore[arg-type]


NOBODY = "http://127.0.0.1:9"
"""Where no cluster is, as when it is gone."""


@pytest.mark.ray
def test_submitted_job_streams_its_log_and_gives_its_status(
    vaejob: Vaejob, ray_head: dict[str, str], job_file: Path, tmp_path: Path
) -> None:
    done = vaejob("submit", job_file, "cluster.workers=2", "--follow", env=ray_head)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6,000 of 6,000 images" in done.stdout
    assert "bits/dim" in done.stdout
    assert "INFO" not in done.stdout + done.stderr  # what Ray says of itself
    record, _ = newest_record(open_bucket(f"{tmp_path}/runs/run"))
    assert record is not None
    assert (record.images_seen, record.world_size) == (6000, 2)
    assert "6,000 of 6,000 images" in vaejob("logs", tmp_path / "runs/run", env=ray_head).stdout

    refused = vaejob("submit", job_file, "run.seed=1", "--follow", "--json", env=ray_head)
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["run"] == f"{tmp_path}/runs/run"
    assert "belongs to a run with other settings (run.seed: 0 -> 1)" in refused.stderr


@pytest.mark.ray
def test_stopped_job_leaves_a_run_that_its_address_alone_resumes(
    vaejob: Vaejob, ray_head: dict[str, str], job_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs/run"
    images = "training.images=2000000"
    following = subprocess.Popen(
        [sys.executable, "-m", "vaejob", "submit", str(job_file), images, "--follow",
         "training.report_every_images=2000", "cluster.workers=1"],
        env={**os.environ, **ray_head}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not recorded_images(open_bucket(str(run))):
        assert time.monotonic() < deadline
        assert following.poll() is None
        time.sleep(0.2)
    stopped = vaejob("stop", run, env=ray_head)
    assert stopped.returncode == 0, stopped.stderr
    reached = recorded_images(open_bucket(str(run)))[-1]
    assert f"stopped: its newest checkpoint is at {reached:,} images" in stopped.stdout
    log, _ = following.communicate(timeout=60)
    assert following.returncode == 85, log
    assert f"stopped at {reached:,} of 2,000,000 images" in log
    resumed = vaejob("resume", run, f"training.images={reached + 1000}", "cluster.workers=0")
    assert resumed.returncode == 0, resumed.stderr
    assert recorded_images(open_bucket(str(run)))[-1] == reached + 1000


def drivers_of(run: Path) -> list[psutil.Process]:
    """The processes `vaejob train` of the run's job, attended on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-3:] == ["vaejob", "train", "job.yaml"]:
                job = Path(process.cwd(), "job.yaml").read_text()
                found += [process] if f"bucket: {run.parent}" in job and f"name: {run.name}" in job else []
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.ray
def test_killed_driver_is_started_again_beside_another_job_and_its_log_outlives_the_cluster(
    vaejob: Vaejob, ray_head: dict[str, str], job_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs/run"
    submitted = vaejob("submit", job_file, "training.images=20000", "cluster.workers=1", env=ray_head)
    assert submitted.returncode == 0, submitted.stderr
    again = vaejob("submit", job_file, "training.images=20000", env=ray_head)
    assert again.returncode == 2, again.stdout + again.stderr
    assert (
        f"of {run} is under way on this cluster: follow it with vaejob logs {run} --follow, or end it" in again.stderr
    )

    other = subprocess.Popen(
        [sys.executable, "-m", "vaejob", "submit", str(job_file), "run.name=other", "training.images=2000",
         "cluster.workers=1", "--follow"],
        env={**os.environ, **ray_head}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not recorded_images(open_bucket(str(run))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (driver,) = drivers_of(run)
    driver.kill()
    ended = vaejob("logs", run, "--follow", env=ray_head)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "vaejob: the driver was killed (SIGKILL); starting it again, 1 of 3" in ended.stdout
    assert "continuing from the checkpoint at" in ended.stdout.partition("starting it again")[2]
    assert "20,000 of 20,000 images" in ended.stdout
    record, _ = newest_record(open_bucket(str(run)))
    assert record is not None
    assert record.images_seen == 20_000
    log, _ = other.communicate(timeout=300)
    assert other.returncode == 0, log

    kept = vaejob("logs", run, "--address", NOBODY)
    assert kept.returncode == 0, kept.stderr
    assert f"no Ray cluster takes jobs at {NOBODY}" in kept.stderr
    assert "this is the log that the run keeps" in kept.stderr
    assert kept.stdout == ended.stdout


@pytest.mark.ray
def test_a_cluster_with_a_token_takes_jobs_from_who_has_it(vaejob: Vaejob, job_file: Path, tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with a_head(tmp_path / "head.log", token) as head:
        for without in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            refused = vaejob("submit", job_file, env={**head, **without})
            assert refused.returncode == 3, refused.stdout + refused.stderr
            assert refused.stderr.count("\n") == 1, refused.stderr
            assert "token" in refused.stderr
        taken = vaejob(
            "submit", job_file, "cluster.workers=1", "training.images=1000", "--follow", env={**head, **token}
        )
        assert taken.returncode == 0, taken.stdout + taken.stderr
        assert "1,000 of 1,000 images" in taken.stdout
