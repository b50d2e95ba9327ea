"""A job whose bucket answers badly, and whose shards are damaged, as its user sees it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.job.conftest import DIGITS_JOB, Vaejob
from tests.s3.faultproxy import FaultProxy
from tests.s3.server import S3Server
from vaejob.data.batches import open_data
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_rows

pytestmark = pytest.mark.s3

LENGTH = ("training.images=2000", "training.report_every_images=200", "training.evaluate_every_images=1000")
MAY_DIFFER = ("attempt", "written_at", "seconds", "data_wait_seconds", "retries", "retry_causes")


def test_a_job_over_a_bad_line_is_the_job_over_a_good_one(
    vaejob: Vaejob, digits: str, s3_bucket: str, s3_env: S3Server, tmp_path: Path
) -> None:
    """Requests are refused, cut off, answered with a flipped byte or with too little."""
    for split in ("train", "test"):
        for key in open_bucket(f"{digits}/{split}").keys():  # noqa: SIM118 - a bucket is no dict
            open_bucket(f"{s3_bucket}/digits/{split}").write(key, open_bucket(f"{digits}/{split}").read(key))
    job = tmp_path / "job.yaml"
    job.write_text(DIGITS_JOB.format(bucket=f"{s3_bucket}/runs", digits=f"{s3_bucket}/digits"))
    good = vaejob("train", job, "run.name=good", *LENGTH)
    assert good.returncode == 0, good.stderr
    with FaultProxy(upstream=s3_env.port) as proxy:
        shards = {"method": "GET", "path": "parquet"}
        proxy.strike(
            {"fault": "status", "code": 503, "s3code": "SlowDown", "count": 3, **shards},
            {"fault": "reset_mid", "at": 700, "skip": 2, "count": 2, **shards},
            {"fault": "corrupt", "at": 900, "skip": 5, "count": 2, **shards},
            {"fault": "short_length", "at": 800, "skip": 8, "count": 2, **shards},
        )
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        bad = vaejob("train", job, "run.name=bad", *LENGTH, env=endpoint)
    assert bad.returncode == 0, bad.stderr

    def history(name: str) -> list[dict[str, object]]:
        rows = read_rows(open_bucket(f"{s3_bucket}/runs/{name}"))
        return [{column: value for column, value in row.items() if column not in MAY_DIFFER} for row in rows]

    assert history("bad") == history("good")
    causes = Counter[str]()
    for row in read_rows(open_bucket(f"{s3_bucket}/runs/bad")):
        causes += Counter(json.loads(row["retry_causes"] or "{}"))
    assert len(causes) == 4, causes
    assert causes.total() == 9


def test_a_job_goes_on_without_damaged_images_where_it_may(vaejob: Vaejob, digits: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    for split in ("train", "test"):
        for key in open_bucket(f"{digits}/{split}").keys():  # noqa: SIM118 - a bucket is no dict
            open_bucket(str(damaged / split)).write(key, open_bucket(f"{digits}/{split}").read(key))
    data = open_data(str(damaged / "train"))
    shard, offset = damaged / "train" / "00000.parquet", int(data.row_groups["offset"][1])
    content = bytearray(shard.read_bytes())
    content[offset + 5] ^= 1
    shard.write_bytes(content)
    job = tmp_path / "job.yaml"
    job.write_text(DIGITS_JOB.format(bucket=tmp_path / "runs", digits=damaged))

    refused = vaejob("train", job, *LENGTH)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith(f"vaejob: {shard} row group 1: checksum is")
    went_on = vaejob("train", job, "data.on_corrupt=skip", *LENGTH)
    assert went_on.returncode == 0, went_on.stderr
    assert went_on.stderr.count(f"left out of training: {shard} row group 1: checksum is") == 1
    rows = [row for row in read_rows(open_bucket(str(tmp_path / "runs" / "run"))) if row["split"] == "train"]
    lost = sum(row["missing_images"] for row in rows)
    assert lost >= data.row_group_rows[1]  # once in each epoch
    assert sum(row["images"] for row in rows) == 2000 - lost
