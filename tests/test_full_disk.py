"""A run on a disk that is full ends at once and in a line that says so; with room again its command goes on, and nothing is lost."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.job.conftest import DIGITS_JOB, pack_digits
from vaejob.config import JobConfig, parse_config
from vaejob.errors import BucketError
from vaejob.run import begin, train_here
from vaejob.storage import open_bucket
from vaejob.storage.runs import newest_record, read_rows
from vaejob.training.worker import Event


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def batches(address: str) -> list[tuple[int, str]]:
    return [
        (row["images_seen"], row["ids_digest"]) for row in read_rows(open_bucket(address)) if row["split"] == "train"
    ]


def test_a_full_disk_ends_a_job_in_a_line_and_the_next_start_goes_on(small_disk: Path, tmp_path: Path) -> None:
    digits = pack_digits(f"{tmp_path}/digits")

    def job(bucket: Path) -> JobConfig:
        text = DIGITS_JOB.format(bucket=bucket, digits=digits)
        return parse_config(text, ["training.images=3000", "training.evaluate_every_images=0"])

    filler = small_disk / "filler"

    def fill(event: Event) -> None:
        if event.kind == "record" and not filler.exists():
            with suppress(OSError):
                filler.write_bytes(bytes(shutil.disk_usage(small_disk).free + 1))

    def train(job: JobConfig, *, on_event: Callable[[Event], None] = lambda event: None) -> None:
        token = begin(job)
        assert token
        train_here(job, on_event=on_event, should_stop=lambda: False, token=token)

    with pytest.raises(BucketError, match=r"^\S+ cannot be written: No space left on device"):
        train(job(small_disk), on_event=fill)
    record, damage = newest_record(open_bucket(f"{small_disk}/run"))
    assert record
    assert damage == []
    assert record.images_seen < 3000

    with pytest.raises(BucketError, match="No space left on device"):
        begin(job(small_disk))  # said before any worker is started
    filler.unlink()
    train(job(small_disk))
    train(job(tmp_path / "roomy"))
    assert batches(f"{small_disk}/run") == batches(f"{tmp_path}/roomy/run")
    assert newest_record(open_bucket(f"{small_disk}/run"))[1] == []
