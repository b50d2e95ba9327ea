"""The same job on a cluster that an operator started, by Ray's Jobs API."""

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.job.conftest import Vaejob
from vaejob.cluster.jobs import follow_job
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
