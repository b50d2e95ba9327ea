"""A killed job goes on as if it had never been killed; the number of workers changes nothing that is learnt."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.job.conftest import Vaejob, kill_tree
from vaejob.config import JobConfig
from vaejob.data.batches import open_data
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row, newest_record, read_rows, recorded_images


def state_digests(run: str) -> list[str]:
    """Of the newest state's files."""
    record, damage = newest_record(open_bucket(run))
    assert record is not None
    assert not damage
    return [file.sha256 for file in record.files]


def history(run: str) -> list[Row]:
    """Rows without what may differ: when, by whom and how fast they were made."""
    may_differ = ("attempt", "attempt_started_at_images", "written_at", "seconds", "data_wait_seconds", "world_size")
    return [{key: value for key, value in row.items() if key not in may_differ} for row in read_rows(open_bucket(run))]


def batches_seen(run: str) -> list[tuple[int, str]]:
    """Which images each global batch held: the job reports after every batch."""
    return [(row["images_seen"], row["ids_digest"]) for row in read_rows(open_bucket(run)) if row["split"] == "train"]


def kill_three_times(arguments: list[str], run: Path, *, seed: int) -> list[int]:
    """Starts the job three times and SIGKILLs all of it at a random moment of its training; where each was killed."""
    chance = random.Random(seed)
    killed_at = []
    for _ in range(3):
        before = recorded_images(open_bucket(str(run)))
        process = subprocess.Popen([sys.executable, "-m", "vaejob", *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while recorded_images(open_bucket(str(run)))[-1:] == before[-1:] and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, "the job was over before it could be killed"
        kill_tree(process.pid)
        process.wait()
        killed_at.append(recorded_images(open_bucket(str(run)))[-1])
    return killed_at


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.ray)])
def test_job_killed_three_times_equals_the_uninterrupted_one_bit_for_bit(
    workers: int, vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(job_file), "training.images=48000", f"cluster.workers={workers}"]
    whole = vaejob(*arguments, "run.name=whole")
    assert whole.returncode == 0, whole.stderr

    killed_at = kill_three_times([*arguments, "run.name=killed"], tmp_path / "runs/killed", seed=workers)
    assert 0 < killed_at[0] < killed_at[1] < killed_at[2] < 48000
    last = vaejob(*arguments, "run.name=killed")
    assert last.returncode == 0, last.stderr

    assert state_digests(f"{tmp_path}/runs/killed") == state_digests(f"{tmp_path}/runs/whole")
    assert history(f"{tmp_path}/runs/killed") == history(f"{tmp_path}/runs/whole")


@pytest.mark.ray
def test_two_workers_then_one_then_three_see_the_batches_of_one(
    vaejob: Vaejob, ray_head: dict[str, str], job: JobConfig, job_file: Path, tmp_path: Path
) -> None:
    one = vaejob("train", job_file, "run.name=one")
    assert one.returncode == 0, one.stderr
    epoch = open_data(job.data.train).manifest.images
    for workers, images in ((2, epoch + 8 * 64), (1, 2 * epoch + 17 * 64), (3, 6000)):  # where batches end
        part = vaejob(
            "train",
            job_file,
            "run.name=changing",
            f"training.images={images}",
            f"cluster.workers={workers}",
            env=ray_head,
        )
        assert part.returncode == 0, part.stderr

    steady, changing = f"{tmp_path}/runs/one", f"{tmp_path}/runs/changing"
    assert {row["world_size"] for row in read_rows(open_bucket(changing))} == {1, 2, 3}
    assert batches_seen(changing) == batches_seen(steady)
    final = [[row for row in history(run) if row["split"] == "test"][-1] for run in (steady, changing)]
    assert final[1]["negative_bound_nats"] == pytest.approx(final[0]["negative_bound_nats"], rel=1e-4)


@pytest.mark.ray
def test_killed_worker_is_started_again_and_no_image_is_missed_or_seen_twice(
    vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(job_file), "training.images=60000", "cluster.workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vaejob", *arguments, "run.name=killed"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not recorded_images(open_bucket(f"{tmp_path}/runs/killed")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in child.name()
    ]
    assert len(workers) == 2
    workers[1].kill()
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "continuing from the checkpoint at" in said

    assert vaejob(*arguments, "cluster.workers=0", "run.name=whole").returncode == 0
    assert batches_seen(f"{tmp_path}/runs/killed") == batches_seen(f"{tmp_path}/runs/whole")
