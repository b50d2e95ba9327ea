"""The examination as a Ray job, so that it looks from where `vaejob submit` would run the job."""

from collections.abc import Callable

from vaejob.cluster.jobs import connect, follow_job, shipped
from vaejob.config import JobConfig
from vaejob.errors import ClusterError
from vaejob.run import run_address
from vaejob.storage.runs import new_attempt


def examine_there(job: JobConfig, address: str, *, options: list[str], write: Callable[[str], None]) -> int:
    """Runs `vaejob doctor` on the cluster whose Jobs API is at http://HOST:8265; its exit status.

    This version of the package travels along, as that of a submitted job does. Raises ClusterError.
    """
    client = connect(address)
    with shipped(job) as folder:
        try:
            job_id = client.submit_job(
                entrypoint=" ".join(["python -m vaejob doctor job.yaml", *options]),
                submission_id=f"doctor-{job.run.name}-{new_attempt()}",
                runtime_env={"working_dir": folder},
                metadata={"vaejob_doctor": run_address(job)},
            )
        except RuntimeError as error:
            raise ClusterError(f"the cluster refused the job: {str(error).strip().splitlines()[0]}") from error
    return follow_job(job_id, client, write=write)
