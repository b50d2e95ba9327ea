"""The examination as a Ray job, so that it looks from where `vaejob submit` would run the job."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import vaejob
from vaejob.cluster.jobs import connect, follow_job
from vaejob.config import JobConfig
from vaejob.errors import ClusterError
from vaejob.run import run_address
from vaejob.storage.runs import new_attempt


def examine_there(job: JobConfig, address: str, *, options: list[str], write: Callable[[str], None]) -> int:
    """Runs `vaejob doctor` on the cluster whose Jobs API is at http://HOST:8265; its exit status.

    This version of the package travels along, as that of a submitted job does. Raises ClusterError.
    """
    client = connect(address)
    elsewhere = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": None})})
    with tempfile.TemporaryDirectory(prefix="vaejob-doctor-") as folder:
        shipped = Path(folder) / "vaejob"
        shutil.copytree(Path(vaejob.__file__).parent, shipped, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "job.yaml").write_text(elsewhere.to_yaml())
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
