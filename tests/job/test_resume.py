"""A killed job goes on as if it had never been killed; the number of workers changes nothing that is learnt."""

import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.job.conftest import Vaejob, kill_tree
from tests.job.memory import kill_for_memory
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


def kill_in_mid_run(
    arguments: list[str], run: Path, *, chance: random.Random, env: dict[str, str] | None = None
) -> int:
    """Starts the job and SIGKILLs all of it at a random moment after a checkpoint of its own; where the newest one is."""
    bucket = open_bucket(str(run))
    before = recorded_images(bucket)
    command = [sys.executable, "-m", "vaejob", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    deadline = time.monotonic() + 300
    while recorded_images(bucket)[-1:] == before[-1:] and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    assert process.poll() is None, "the job was over before it could be killed"
    kill_tree(process.pid)
    process.wait()
    return recorded_images(bucket)[-1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.ray)])
def test_job_killed_three_times_equals_the_uninterrupted_one_bit_for_bit(
    workers: int, vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(job_file), "training.images=48000", f"cluster.workers={workers}"]
    whole = vaejob(*arguments, "run.name=whole")
    assert whole.returncode == 0, whole.stderr

    chance = random.Random(workers)
    killed = [*arguments, "run.name=killed"]
    killed_at = [kill_in_mid_run(killed, tmp_path / "runs/killed", chance=chance) for _ in range(3)]
    assert 0 < killed_at[0] < killed_at[1] < killed_at[2] < 48000
    last = vaejob(*arguments, "run.name=killed")
    assert last.returncode == 0, last.stderr

    assert state_digests(f"{tmp_path}/runs/killed") == state_digests(f"{tmp_path}/runs/whole")
    assert history(f"{tmp_path}/runs/killed") == history(f"{tmp_path}/runs/whole")


@pytest.mark.ray
def test_killed_with_two_workers_then_with_one_then_three_see_the_batches_of_one(
    vaejob: Vaejob, ray_head: dict[str, str], job_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(job_file), "training.images=48000"]
    one = vaejob(*arguments, "run.name=one")
    assert one.returncode == 0, one.stderr
    changing = [*arguments, "run.name=changing"]
    # What Ray Train would go on from had it kept it here, torn: its controller would die of it.
    open_bucket(f"{tmp_path}/runs/changing").write("checkpoint_manager_snapshot.json", b'{"checkpoint_results": [')
    for workers in (2, 1):
        settings = [*changing, f"cluster.workers={workers}"]
        kill_in_mid_run(settings, tmp_path / "runs/changing", chance=random.Random(workers), env=ray_head)
    last = vaejob(*changing, "cluster.workers=3", env=ray_head)
    assert last.returncode == 0, last.stderr

    runs = [f"{tmp_path}/runs/{name}" for name in ("one", "changing")]
    assert {row["world_size"] for row in read_rows(open_bucket(runs[1]))} == {1, 2, 3}
    assert batches_seen(runs[1]) == batches_seen(runs[0])
    final = [[row for row in history(run) if row["split"] == "test"][-1] for run in runs]
    assert final[1]["negative_bound_nats"] == pytest.approx(final[0]["negative_bound_nats"], rel=1e-3)


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
    deadline = time.monotonic() + 300
    while not recorded_images(open_bucket(f"{tmp_path}/runs/killed")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in child.name()
    ]
    assert len(workers) == 2
    assert [worker.environ()["MALLOC_ARENA_MAX"] for worker in workers] == ["1", "1"]
    kill_for_memory(workers[1])
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "continuing from the checkpoint at" in said
    named = f"worker {{}} (pid {workers[1].pid} on {platform.node()}) failed: its process was killed: by the kernel where memory"
    assert any(named.format(rank) in said for rank in (0, 1)), said

    assert vaejob(*arguments, "cluster.workers=0", "run.name=whole").returncode == 0
    assert batches_seen(f"{tmp_path}/runs/killed") == batches_seen(f"{tmp_path}/runs/whole")
