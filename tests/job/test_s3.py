"""The main job with everything in object storage: shards, checkpoints, metrics, pictures."""

import json

import pytest

from tests.job.conftest import Vaejob
from vaejob.storage import open_bucket
from vaejob.storage.runs import newest_record, read_rows

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def test_job_streams_from_s3_and_every_number_of_workers_scores_it_alike(
    vaejob: Vaejob, ray_head: dict[str, str], s3_bucket: str, digits_npz: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = vaejob(
        "pack", digits_npz, f"{s3_bucket}/digits", "--split", "train=0.8,test=0.2", "--row-group-bytes", "6400"
    )
    assert packed.returncode == 0, packed.stderr
    path = tmp_path_factory.mktemp("s3-job") / "job.yaml"
    path.write_text(
        f"""
run: {{name: digits, bucket: {s3_bucket}/runs}}
data: {{train: {s3_bucket}/digits/train, test: {s3_bucket}/digits/test, global_batch: 100, lanes: 7, window_rows: 64}}
model: {{family: conv, latent: 8, channels: [8, 16]}}
likelihood: {{pixels: bernoulli, binarize: dynamic}}
training: {{images: 4000, report_every_images: 500}}
checkpoint: {{every_images: 1000}}
cluster: {{workers: 2}}
"""
    )
    trained = vaejob("train", path, "--json", env=ray_head)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)

    run = open_bucket(f"{s3_bucket}/runs/digits")
    record, damage = newest_record(run)
    assert record is not None
    assert not damage
    assert (record.images_seen, record.world_size, len(record.files)) == (4000, 2, 2)
    assert result["held_out"] == record.held_out
    assert sum(row["images"] for row in read_rows(run) if row["split"] == "train") == 4000
    assert all(run.size(address.removeprefix(f"{run.url}/")) for address in result["pictures"].values())

    scores = []
    for workers in (0, 1, 2, 3):
        scored = vaejob("evaluate", f"{s3_bucket}/runs/digits", "--workers", str(workers), "--json", env=ray_head)
        assert scored.returncode == 0, scored.stderr
        scores.append(json.loads(scored.stdout))
    assert scores[0] == scores[1] == scores[2] == scores[3]
    assert scores[0]["negative_bound_nats"] == result["negative_bound_nats"]  # what the run's own two workers found
