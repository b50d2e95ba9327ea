"""Of a run stays what is referred to, and what is being written; nothing else, and no failure to delete ends training."""

import os
import secrets
import time
from pathlib import Path

import pytest

from tests.s3.faultproxy import FaultProxy
from tests.s3.server import S3Server, client
from tests.test_fencing import Start
from tests.test_step import JOB
from vaejob.config import JobConfig
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.directory import DirectoryBucket
from vaejob.storage.runs import read_record, record_key, recorded_images, state_key


def keeping(last: int, best: int = 0) -> JobConfig:
    kept = JOB.checkpoint.model_copy(update={"keep_last": last, "keep_best": best})
    return JOB.model_copy(update={"checkpoint": kept})


def new_run() -> Bucket:
    return open_bucket(f"memory://{secrets.token_hex(8)}")


def test_states_that_no_record_names_are_removed_once_their_attempt_is_over() -> None:
    run = new_run()
    first = Start(run, "first")
    first.checkpoint(10, images=10)
    first.save(15)  # its record was never written: the job was killed
    second = Start(run, "second", started_at=10)
    second.save(12)
    second.save(30)
    foreign = ["states/readme.txt", "states/000000000012/a-note", "states/12/old-0of1.safetensors"]
    for key in foreign:
        run.write(key, b"not ours")
    second.report(20, images=10, saved=second.save(20))
    left = {state_key(images, attempt=who, rank=0, world_size=1)
            for images, who in ((10, "first"), (12, "second"), (20, "second"), (30, "second"))}  # fmt: skip
    assert set(run.keys("states/")) == left | set(foreign)


def test_states_newer_than_the_newest_record_are_left_alone() -> None:
    run = new_run()
    first = Start(run, "first")
    first.save(50)
    second = Start(run, "second")
    second.checkpoint(20, images=20)
    assert len(run.keys("states/")) == 2
    second.checkpoint(60, images=40)
    assert [key for key in run.keys("states/") if "/first-" in key] == []


def test_files_of_every_record_that_is_kept_stay() -> None:
    run = new_run()
    for number, who in enumerate(("a", "b", "c", "d", "e")):
        start = Start(run, who, job=keeping(2), started_at=20 * number)
        start.save(20 * number + 5)
        start.checkpoint(20 * number + 10, images=10)
        start.checkpoint(20 * number + 20, images=10)
    assert recorded_images(run) == [90, 100]
    named = {file.key for images in recorded_images(run) for file in read_record(run, images).files}
    live = state_key(85, attempt="e", rank=0, world_size=1)
    assert set(run.keys("states/")) == named | {live}


@pytest.mark.parametrize("damage", [b"{torn", b"", b"\xff\xfe", b"[]", b'{"images_seen": 20}'])
def test_a_damaged_record_does_not_end_training(damage: bytes) -> None:
    """One that was passed over goes once the run has a newer one of its own; one that is older stays, with its files."""
    run = new_run()
    first = Start(run, "first")
    for images_seen in (10, 20, 30):
        first.checkpoint(images_seen, images=10)
    for images_seen in (10, 30):
        run.write(record_key(images_seen), damage)
    second = Start(run, "second", started_at=20, job=keeping(5))
    second.checkpoint(25, images=5)
    assert recorded_images(run) == [10, 20, 25]
    assert state_key(10, attempt="first", rank=0, world_size=1) in run.keys("states/")
    second.checkpoint(35, images=10)
    assert state_key(30, attempt="first", rank=0, world_size=1) not in run.keys("states/")
    assert recorded_images(run) == [10, 20, 25, 35]


def test_leftovers_of_killed_writers_go_when_they_are_old(tmp_path: Path) -> None:
    run = DirectoryBucket(str(tmp_path))
    run.write("states/10/a", b"kept")
    old, fresh = tmp_path / "states/10" / f".vaejob-{'0' * 16}", tmp_path / f".vaejob-{'1' * 16}"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert run.keys() == ["states/10/a"]
    assert run.remove_leftovers() == 1
    assert (old.exists(), fresh.exists(), run.read("states/10/a")) == (False, True, b"kept")
    assert DirectoryBucket(str(tmp_path / "none")).remove_leftovers() == 0


@pytest.mark.s3
def test_uploads_in_parts_that_were_broken_off_are_ended_in_this_run_alone(s3_bucket: str, s3_server: S3Server) -> None:
    store, bucket = client(s3_server), s3_bucket.removeprefix("s3://")
    for key in ("runs/a/states/10/x", "runs/a/states/10/y", "runs/ab/states/10/x", "runs/other"):
        store.create_multipart_upload(Bucket=bucket, Key=key)

    def left() -> list[str]:
        return sorted(upload["Key"] for upload in store.list_multipart_uploads(Bucket=bucket).get("Uploads", []))

    run = open_bucket(f"{s3_bucket}/runs/a")
    run.write("states/10/x", b"kept")
    assert run.remove_leftovers() == 0  # a writer may be at work on them
    assert len(left()) == 4
    assert run.remove_leftovers(older_than_s=-5) == 2
    assert left() == ["runs/ab/states/10/x", "runs/other"]
    assert run.read("states/10/x") == b"kept"


@pytest.mark.s3
def test_a_store_that_does_not_let_uploads_be_ended_ends_no_start(
    s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(upstream=s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.strike({"fault": "status", "code": 403, "s3code": "AccessDenied", "path": "uploads"})
        assert open_bucket(f"{s3_bucket}/runs/a").remove_leftovers() == 0
        assert any(request["fault"] for request in proxy.log)
