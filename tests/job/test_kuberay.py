"""A rendered RayJob: the very commands of its pods train, and a head that dies costs what is since the last checkpoint."""

from pathlib import Path

import pytest

from tests.job.conftest import Vaejob
from tests.job.kuberay import RayJob
from tests.job.nodes import wait_for
from tests.s3.server import S3Server
from vaejob.storage import open_bucket
from vaejob.storage.runs import newest_record, read_rows, recorded_images

pytestmark = [pytest.mark.ray, pytest.mark.s3]

JOB = """
run: {{name: digits, bucket: {bucket}/runs}}
data: {{train: {bucket}/digits/train, test: {bucket}/digits/test, global_batch: 64, lanes: 6, window_rows: 64}}
model: {{family: mlp, latent: 8, hidden: [64, 64]}}
likelihood: {{pixels: discretized-logistic, bits: 4}}
training: {{images: 40000, report_every_images: 1000}}
checkpoint: {{every_images: 2000}}
cluster: {{workers: 2, wait_seconds: 120}}
deploy:
  image: registry.example/vaejob@sha256:{digest}
  secret_name: bucket-keys
  retries: 1
  env: {env}
"""


def test_rendered_job_trains_and_goes_on_in_the_cluster_of_a_retry(
    vaejob: Vaejob, s3_env: S3Server, s3_bucket: str, digits_npz: str, tmp_path: Path
) -> None:
    packed = vaejob("pack", digits_npz, f"{s3_bucket}/digits", "--split", "train=0.8,test=0.2")
    assert packed.returncode == 0, packed.stderr
    keys = {name: value for name, value in s3_env.environment.items() if "KEY" in name}
    plain = {name: value for name, value in s3_env.environment.items() if name.startswith("AWS") and name not in keys}
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(bucket=s3_bucket, digest="0123456789abcdef" * 4, env=plain))
    rendered = vaejob("render", "kuberay", job, "--out", tmp_path / "rendered")
    assert rendered.returncode == 0, rendered.stderr
    run = open_bucket(f"{s3_bucket}/runs/digits")

    applied = RayJob(tmp_path / "rendered", secret=keys, folder=tmp_path / "pods")
    first = applied.attempt(0)
    try:
        wait_for(lambda: recorded_images(run), seconds=300, said=first.said)
        first.lose_head()
        reached = recorded_images(run)[-1]
        assert reached < 40_000
        assert first.submitter.wait(120) != 0
        second = applied.attempt(1)  # while the workers of the first may still run
        try:
            assert second.wait_for_end(seconds=300) == "SUCCEEDED", second.said()
        finally:
            second.delete()
    finally:
        first.delete()
    assert f"continuing from the checkpoint at {reached:,} images" in second.said()
    record, damage = newest_record(run)
    assert record is not None
    assert (record.images_seen, record.world_size, record.begun, damage) == (40_000, 2, 2, [])
    assert sum(row["images"] for row in read_rows(run) if row["split"] == "train") == 40_000
