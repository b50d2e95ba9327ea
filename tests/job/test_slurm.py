"""The rendered batch script under a real Slurm: trained, asked to save as its time is up, requeued, and gone on with."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.job.conftest import Vaejob
from tests.job.slurm import Slurm, missing
from tests.s3.server import S3Server
from vaejob.storage import open_bucket
from vaejob.storage.runs import newest_record, read_rows, recorded_images

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.skipif(bool(missing()), reason=f"Slurm {missing()}")]

JOB = """
run: {{name: digits, bucket: {bucket}/runs}}
data: {{train: {bucket}/digits/train, test: {bucket}/digits/test, global_batch: 64, lanes: 6, window_rows: 64}}
model: {{family: mlp, latent: 8, hidden: [64, 64]}}
likelihood: {{pixels: discretized-logistic, bits: 4}}
training: {{images: {images}, report_every_images: 2000}}
checkpoint: {{every_images: 4000}}
cluster: {{workers: 2, wait_seconds: 120}}
deploy:
  setup: ["export PATH={path}:$PATH"]
  env: {{AWS_ENDPOINT_URL: "{endpoint}", AWS_ALLOW_HTTP: "true", GLOO_SOCKET_IFNAME: eth0}}
"""
IMAGES = 60_000


@pytest.fixture
def slurm(s3_env: S3Server) -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/var/tmp") as folder:  # short, and not where jobs write
        cluster = Slurm(Path(folder), store_port=s3_env.port)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def test_batch_script_saves_when_told_is_requeued_and_goes_on(
    vaejob: Vaejob, slurm: Slurm, s3_bucket: str, digits_npz: str, tmp_path: Path
) -> None:
    packed = vaejob("pack", digits_npz, f"{s3_bucket}/digits", "--split", "train=0.8,test=0.2")
    assert packed.returncode == 0, packed.stderr
    job = tmp_path / "job.yaml"
    job.write_text(
        JOB.format(bucket=s3_bucket, images=IMAGES, path=Path(sys.executable).parent, endpoint=slurm.endpoint)
    )
    script = vaejob("render", "slurm", job)
    assert script.returncode == 0, script.stderr
    (tmp_path / "job.sbatch").write_text(script.stdout)
    log = tmp_path / "log"
    said = lambda: log.read_text() if log.exists() else ""  # noqa: E731
    run = open_bucket(f"{s3_bucket}/runs/digits")

    number = slurm.call("sbatch", "--parsable", f"--output={log}", str(tmp_path / "job.sbatch")).strip()
    assert number == str(slurm.next_job)
    slurm.wait(
        number, lambda state: bool(recorded_images(run)) or state["JobState"] == "FAILED", seconds=300, said=said
    )
    assert recorded_images(run), said()
    slurm.call("scancel", "--batch", "--signal=USR1", number)  # as Slurm does at --signal=B:USR1@...
    slurm.wait(number, lambda state: state["Restarts"] == "1", seconds=180, said=said)
    reached = recorded_images(run)[-1]
    slurm.start_again(number, said=said)
    slurm.wait(number, lambda state: state["JobState"] == "COMPLETED", seconds=300, said=said)

    text = said()
    assert "start 0 on n[1-2], Ray at 10." in text
    assert "notice: the time is nearly up; saving a checkpoint" in text
    assert f"stopped at {reached:,} of {IMAGES:,} images" in text
    assert "vaejob ended with 85" in text
    assert "start 1 on n[1-2], Ray at 10." in text
    assert f"continuing from the checkpoint at {reached:,} images" in text
    assert "vaejob ended with 0" in text
    record, damage = newest_record(run)
    assert record is not None
    assert (record.images_seen, record.world_size, record.begun, damage) == (IMAGES, 2, 2, [])
    assert sum(row["images"] for row in read_rows(run) if row["split"] == "train") == IMAGES
