"""Carries a job to a Ray cluster by the Jobs API, with this version of the code, and finds it again by its run."""

import asyncio
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vaejob.config import JobConfig
from vaejob.errors import STOPPED_STATUS, ClusterError, RunError
from vaejob.run import run_address
from vaejob.storage.runs import new_attempt
from vaejob.version import VERSION

STOP_SECONDS = 120
"""How long a job that was asked to stop may take to save a checkpoint before Ray kills it."""
OF_RAY = re.compile(r"^(\S+ \S+\tINFO job_manager\.py:\d+ -- |Running entrypoint for job ).*\n", re.MULTILINE)
"""A line of Ray's own in the log of a job."""
MOST_BYTES = 100 << 20
"""What the Jobs API takes at once."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def connect(address: str | None) -> JobSubmissionClient:
    """The Jobs API of a cluster's head, http://HOST:8265. Raises ClusterError if none answers there."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        found = (
            "the token here is not its own" if os.environ.get("RAY_AUTH_TOKEN") else "RAY_AUTH_TOKEN is not set here"
        )
        raise ClusterError(
            f"the cluster at {address} asks for a token, and {found}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its nodes"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster takes jobs at {address}: {str(error).strip().splitlines()[0]}") from error
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # after the client, which sets levels of its own
    return client


def submit_job(job: JobConfig, client: JobSubmissionClient) -> str:
    """Starts the job's driver on the cluster; the id of the Ray job.

    The package itself travels along, so that driver and workers run this very version; what it needs (torch, ray, ...)
    is the cluster's. The Ray job is named after the run, which stays the same over attempts.

    Raises RunError while another job of this run is under way there, ClusterError where the cluster has another Ray or
    refuses the job.
    """
    run = run_address(job)
    _refuse_other_ray(client)
    if under_way := [other for other in _jobs_of(run, client) if other.status not in ENDED]:
        raise RunError(
            f"{under_way[0].submission_id} of {run} is under way on this cluster: follow it with vaejob logs {run} --follow, "
            f"or end it first with vaejob stop {run}"
        )
    attempt = new_attempt()
    with shipped(job) as folder:
        try:
            return client.submit_job(
                entrypoint=f"python -m vaejob.cluster.attend job.yaml {attempt}",
                submission_id=f"{job.run.name}-{attempt}",
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
                metadata={"vaejob_run": run, "vaejob_settings": job.fingerprint, "vaejob_version": VERSION},
            )
        except RuntimeError as error:
            raise ClusterError(f"the cluster refused the job: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def shipped(job: JobConfig) -> Iterator[str]:
    """A folder that goes to a cluster: this version of the package, and the job as it runs there. Raises ClusterError."""
    elsewhere = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": None})})
    with tempfile.TemporaryDirectory(prefix="vaejob-ship-") as folder:
        package = Path(__file__).parents[1]
        shutil.copytree(package, Path(folder) / "vaejob", ignore=shutil.ignore_patterns("__pycache__"))
        _refuse_much(package, Path(folder))
        (Path(folder) / "job.yaml").write_text(elsewhere.to_yaml())
        yield folder


def _refuse_other_ray(client: JobSubmissionClient) -> None:
    """Only the last part of a version may differ."""
    answer = client._do_request("GET", "/api/version").json()  # get_version gives the API's
    here, there = ray.__version__, str(answer["ray_version"])
    if here.split(".")[:2] != there.split(".")[:2]:
        raise ClusterError(f"the cluster at {client.get_address()} runs Ray {there}; this vaejob needs {here}")


def _refuse_much(package: Path, copied: Path) -> None:
    total = sum(file.stat().st_size for file in copied.rglob("*") if file.is_file())
    if total > MOST_BYTES:
        raise ClusterError(
            f"{package} holds {total / 2**20:,.0f} MiB, of which a cluster takes {MOST_BYTES >> 20}: take out what is not vaejob's"
        )


def _jobs_of(run: str, client: JobSubmissionClient) -> list[JobDetails]:
    return [job for job in client.list_jobs() if (job.metadata or {}).get("vaejob_run") == run.rstrip("/")]


def find_job(run: str, client: JobSubmissionClient) -> str:
    """The id of a run's newest Ray job. Raises RunError if the cluster has none."""
    jobs = _jobs_of(run, client)
    if not jobs:
        raise RunError(f"no job of {run} was submitted to this cluster")
    return max(jobs, key=lambda job: job.start_time or 0).submission_id or ""


def follow_job(job_id: str, client: JobSubmissionClient, *, write: Callable[[str], None]) -> int:
    """Passes on the job's log until it ends; the exit status of its driver. Raises ClusterError where the line breaks."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            write(OF_RAY.sub("", text))

    try:
        asyncio.run(tail())
        return wait_for_end(job_id, client)
    except (RuntimeError, aiohttp.ClientError, OSError) as error:  # OSError: also what requests raises
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"the cluster was lost while its log came: {why}; the job may go on there: look again with vaejob logs"
        ) from error


def log_of(job_id: str, client: JobSubmissionClient) -> str:
    """All that the job has said so far."""
    return OF_RAY.sub("", client.get_job_logs(job_id))


def stop_job(job_id: str, client: JobSubmissionClient) -> int:
    """Asks the job to save a checkpoint and end, and waits for it; the exit status of its driver."""
    client.stop_job(job_id)
    return wait_for_end(job_id, client)


def wait_for_end(job_id: str, client: JobSubmissionClient) -> int:
    while (status := client.get_job_status(job_id)) not in ENDED:
        time.sleep(0.5)
    if status == JobStatus.STOPPED:
        return STOPPED_STATUS  # Ray keeps no exit status of a driver that it was asked to stop
    code = client.get_job_info(job_id).driver_exit_code
    return int(code) if code is not None else 3
