"""vaejob doctor as its user sees it: what is well passes, and each thing that is not fails with its own line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.job.conftest import DIGITS_JOB, Vaejob
from tests.s3.faultproxy import FaultProxy, Rule
from tests.s3.server import S3Server
from vaejob.data.batches import open_data
from vaejob.storage import open_bucket


def examined(vaejob: Vaejob, *arguments: object, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Exit status, and the worst finding of each subject."""
    done = vaejob("doctor", *map(str, arguments), "--json", env=env)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exit_status"] == done.returncode, done.stderr
    order = ["ok", "warn", "fail"]
    found = sorted(answer["findings"], key=lambda finding: order.index(finding["level"]))
    assert all(bool(finding["advice"]) == (finding["level"] != "ok") for finding in found), found
    return done.returncode, {finding["subject"]: finding for finding in found}


def copied(digits: str, to: str) -> str:
    """The packed digits at another address."""
    for split in ("train", "test"):
        source = open_bucket(f"{digits}/{split}")
        for key in source.keys():  # noqa: SIM118 - a bucket is no dict
            open_bucket(f"{to}/{split}").write(key, source.read(key))
    return to


def through_proxy(vaejob: Vaejob, server: S3Server, rule: Rule, *arguments: object) -> tuple[int, dict[str, Any]]:
    with FaultProxy(upstream=server.port) as proxy:
        proxy.strike(rule)
        return examined(vaejob, *arguments, env={"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"})


def test_a_sound_job_passes_and_is_measured(vaejob: Vaejob, job_file: Path, tmp_path: Path) -> None:
    done = vaejob("doctor", job_file, "--measure", "--price-per-hour", "10", "likelihood.bits=5", env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    subjects = [line.split("  ")[1].strip() or line[6:19].strip() for line in lines if line.startswith("ok ")]
    text = " ".join(done.stdout.split())
    for said in ("1,427 images of 1x8x8", "8 of 15 row groups", "a second conditional put is refused", "largest batch",
                 "images/s at data.global_batch=64", "for 6,000 images in all, measured now; at 10 an hour"):  # fmt: skip
        assert said in text, (said, subjects)
    assert lines[-1].startswith("all ")
    assert open_bucket(str(tmp_path / "runs")).keys() == []


def test_damaged_shards_and_other_image_sizes_are_wrong_input(
    vaejob: Vaejob, job_file: Path, digits: str, tmp_path: Path
) -> None:
    status, found = examined(vaejob, job_file, "model.family=hierarchical", "model.layers=7x1,14x1,28x1")
    assert (status, found["model"]["level"]) == (2, "fail")
    assert "its last size must be that of the pictures, 8" in found["model"]["found"]

    damaged = copied(digits, str(tmp_path / "damaged"))
    shard = Path(damaged) / "train" / "00000.parquet"
    content = bytearray(shard.read_bytes())
    content[int(open_data(f"{damaged}/train").row_groups["offset"][0]) + 5] ^= 1
    shard.write_bytes(content)
    status, found = examined(vaejob, job_file, f"data.train={damaged}/train")
    assert (status, found["data.train"]["level"], found["data.test"]["level"]) == (2, "fail", "ok")
    assert f"{shard} row group 0: checksum is" in found["data.train"]["found"]

    status, found = examined(vaejob, job_file, f"data.train={tmp_path}/nothing")
    assert (status, found["data.train"]["level"]) == (2, "fail")
    assert vaejob("doctor", job_file, "data.global_batch=0").returncode == 2


def test_a_run_that_has_begun_tells_its_own_speed(vaejob: Vaejob, job_file: Path) -> None:
    trained = vaejob("train", job_file, "training.images=600")
    assert trained.returncode == 0, trained.stderr
    status, found = examined(vaejob, job_file)
    assert status == 0
    assert "600 of 6,000 images" in found["run"]["found"]
    assert "of this run" in found["time"]["found"]
    status, found = examined(vaejob, job_file, "run.seed=1")
    assert (status, found["run"]["level"]) == (2, "fail")
    assert "run.seed: 0 -> 1" in found["run"]["found"]


@pytest.mark.s3
def test_a_store_without_conditional_writes_is_warned_of(
    vaejob: Vaejob, s3_env: S3Server, s3_bucket: str, digits: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(DIGITS_JOB.format(bucket=f"{s3_bucket}/runs", digits=digits))
    status, found = examined(vaejob, job)
    assert (status, found["starts"]["level"], found["bucket"]["level"]) == (0, "ok", "ok")
    never = {"fault": "status", "code": 501, "s3code": "NotImplemented", "method": "PUT", "header": "if-none-match"}
    status, found = through_proxy(vaejob, s3_env, never, job)
    assert (status, found["starts"]["level"], found["bucket"]["level"]) == (0, "warn", "ok")
    assert open_bucket(s3_bucket).keys() == []


@pytest.mark.s3
@pytest.mark.ray
def test_a_bucket_that_workers_may_only_read_fails_from_each_worker(
    vaejob: Vaejob, s3_env: S3Server, s3_bucket: str, digits: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    copied(digits, f"{s3_bucket}/digits")
    job.write_text(DIGITS_JOB.format(bucket=f"{s3_bucket}/runs", digits=f"{s3_bucket}/digits"))
    denied = {"fault": "status", "code": 403, "s3code": "AccessDenied", "method": "PUT"}
    status, found = through_proxy(vaejob, s3_env, denied, job, "cluster.workers=2")
    assert (status, found["bucket"]["level"], found["data.train"]["level"]) == (3, "fail", "ok")
    assert "worker 0, worker 1, the driver: put: " in found["bucket"]["found"]
    assert "access denied" in found["bucket"]["found"]
    assert (found["network"]["level"], found["versions"]["level"], found["clocks"]["level"]) == ("ok", "ok", "ok")
    assert "gloo" in found["network"]["found"]


@pytest.mark.ray
def test_a_cluster_that_is_too_small_fails_and_is_examined_as_far_as_it_goes(vaejob: Vaejob, job_file: Path) -> None:
    status, found = examined(vaejob, job_file, "cluster.workers=500", "--price-per-hour", "1")
    assert (status, found["workers"]["level"]) == (3, "fail")
    assert "cluster.workers is 500: they ask for 500 CPUs" in found["workers"]["found"]
    assert (found["bucket"]["level"], found["batch"]["level"], found["time"]["level"]) == ("ok", "warn", "warn")
    silent = examined(vaejob, job_file, "cluster.workers=1", "cluster.wait_seconds=0", "--address", "127.0.0.1:9")
    assert (silent[0], silent[1]["workers"]["level"]) == (3, "fail")


@pytest.mark.s3
@pytest.mark.ray
def test_a_cluster_is_examined_from_its_own_head(
    vaejob: Vaejob, ray_head: dict[str, str], s3_bucket: str, digits: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    copied(digits, f"{s3_bucket}/digits")
    job.write_text(DIGITS_JOB.format(bucket=f"{s3_bucket}/runs", digits=f"{s3_bucket}/digits"))
    address = ray_head["RAY_API_SERVER_ADDRESS"]
    there = vaejob("doctor", job, "cluster.workers=2", "--address", address, env=ray_head)
    assert there.returncode == 0, there.stdout + there.stderr
    assert "room for 2 workers on 1 node" in " ".join(there.stdout.split())
    assert "from the driver: put" in " ".join(there.stdout.split())
    nothing = f"data.train={tmp_path}/nothing"
    status, found = examined(vaejob, job, nothing, "cluster.workers=2", "--address", address, env=ray_head)
    assert (status, found["data.train"]["level"], found["bucket"]["level"]) == (2, "fail", "ok")
    assert all(not key.startswith("runs/") for key in open_bucket(s3_bucket).keys())  # noqa: SIM118
