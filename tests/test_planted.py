"""A start never dies of what lies in the bucket, and nothing of it is taken for the run's own, or deleted."""

import secrets
from pathlib import Path

import pytest

from tests.job.conftest import DIGITS_JOB, pack_digits
from vaejob.cli.overview import look_at
from vaejob.config import JobConfig, parse_config
from vaejob.errors import CheckpointError
from vaejob.run import begin, restorable, run_address, train_here
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.memory import MemoryBucket
from vaejob.storage.runs import newest_record, read_rows, record_key, recorded_images

PICKLE = b"cos\nsystem\n(S'touch /tmp/was-executed'\ntR."
PLANTED = {
    ".validate_storage_marker": b"",
    "checkpoint_manager_snapshot.json": b'{"checkpoint_results": [{"checkpoint_dir_name": "gone"',  # torn
    "checkpoint_000001/.metadata": PICKLE,
    "checkpoint_000001/rank_0.pt": PICKLE,
    "records/12.json": b"{}",
    "records/.DS_Store": b"\0",
    "records/notes.txt": b"mine",
    "records/000000000150/a.json": b"{}",
    "states/readme": b"mine",
    "states/000000000150/model.pt": PICKLE,
    "states/000000000150.safetensors": b"",
    "metrics/.DS_Store": b"\0",
    "metrics/notes.txt": b"mine",
    "metrics/events.out.tfevents.0.host": b"\0\0",
    "metrics/old/a-000000.parquet": b"PAR1",
    "attempts/1.yaml": b"- [",
    "attempts/notes": b"mine",
    "pictures/mine.png": b"",
    "job.yaml.orig": b"{",
}


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    text = DIGITS_JOB.format(bucket=tmp_path / "runs", digits=pack_digits(f"{tmp_path}/digits"))
    return parse_config(text, ["training.images=600", "checkpoint.every_images=200"])


def trained(job: JobConfig, *, images: int) -> Bucket:
    """The run, after a start that was to come so far."""
    job = job.model_copy(update={"training": job.training.model_copy(update={"images": images})})
    token = begin(job)
    assert token
    train_here(job, on_event=lambda event: None, should_stop=lambda: False, token=token)
    run = open_bucket(run_address(job))
    record, damage = newest_record(run)
    assert record
    assert (record.images_seen, damage) == (images, [])
    return run


def test_files_of_others_disturb_no_start_and_stay(job: JobConfig) -> None:
    run = open_bucket(run_address(job))
    for key, data in PLANTED.items():
        run.write(key, data)
    trained(job, images=600)
    trained(job, images=1000)
    assert sum(row["images"] for row in read_rows(run) if row["split"] == "train") == 1000
    assert {key: run.read(key) for key in PLANTED} == PLANTED
    assert look_at(run.url, whole_history=True).rows == read_rows(run)


@pytest.mark.parametrize("folder", ["states", "metrics", "attempts", "pictures"])
def test_a_folder_that_is_gone_ends_no_start(folder: str, job: JobConfig) -> None:
    """Where the states are, no checkpoint can be restored: that is told, for starting over would hide the loss."""
    run = trained(job, images=600)
    for key in run.keys(f"{folder}/"):
        run.delete(key)
    if folder == "states":
        with pytest.raises(CheckpointError, match=r"none of .* checkpoints can be restored; the newest: .* is gone"):
            trained(job, images=1000)
    else:
        trained(job, images=1000)


@pytest.mark.parametrize("data", [b"", b"PAR1 torn", b"\0" * 100])
def test_damaged_rows_end_no_start_and_are_named(data: bytes, job: JobConfig) -> None:
    run = trained(job, images=600)
    (key,) = run.keys("metrics/")
    run.write(key, data)
    trained(job, images=1000)
    with pytest.raises(CheckpointError, match=f"{key} is damaged: "):
        read_rows(run)


class Tidied(MemoryBucket):
    """A bucket in which records are deleted right after they are listed."""

    def keys(self, prefix: str = "") -> list[str]:
        found = super().keys(prefix)
        if prefix == "records/":
            for key in found:
                self.delete(key)
        return found


def test_a_record_that_is_tidied_away_between_two_looks_is_none() -> None:
    run = Tidied(f"memory://{secrets.token_hex(8)}")
    run.write(record_key(640), b"{}")
    assert newest_record(run) == (None, [])
    run.write(record_key(640), b"{}")
    assert restorable(run) == (None, None, [])
    assert recorded_images(run) == []
