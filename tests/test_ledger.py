"""The driver's book holds the job's numbers and nobody else's."""

import io
import secrets
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vaejob.training.ledger
from tests.test_step import JOB
from vaejob.config import JobConfig
from vaejob.errors import CheckpointError, ClusterError
from vaejob.metrics import LikelihoodTotals
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.runs import StateFile, read_record, read_rows, recorded_images, write_state_file
from vaejob.training.ledger import Ledger
from vaejob.training.worker import Event, Report


def new_run() -> Bucket:
    return open_bucket(f"memory://{secrets.token_hex(8)}")


def ledger_of(run: Bucket, *, job: JobConfig = JOB, test_images: int | None = None) -> Ledger:
    return Ledger(
        run, job, train_fingerprint="a", test_fingerprint="b", test_images=test_images, shape=(1, 4, 4),
        on_event=lambda event: None,
    )  # fmt: skip


def totals_of(nats: list[int]) -> LikelihoodTotals:
    return LikelihoodTotals(images=len(nats), dims=16 * len(nats), negative_bound_nats=float(sum(nats)))


def moment(images_seen: int, world_size: int, *, attempt: str = "1", started_at: int = 0, **each: list) -> list[Report]:
    """One report of every rank; each names a field and its value on every rank."""
    return [
        Report(
            images_seen=images_seen, attempt=attempt, attempt_started_at_images=started_at, rank=rank,
            world_size=world_size, **{name: values[rank] for name, values in each.items()},
        )
        for rank in range(world_size)
    ]  # fmt: skip


def saved_by(run: Bucket, images_seen: int, ranks: int) -> list[dict[int, StateFile]]:
    return [{images_seen: write_state_file(run, f"states/{images_seen}/{rank}", b"x")} for rank in range(ranks)]


@given(parts=st.lists(st.lists(st.integers(0, 500), max_size=5), min_size=1, max_size=5).filter(any))
def test_row_is_the_sum_over_all_workers(parts: list[list[int]]) -> None:
    run = new_run()
    digests = [2**64 - 1 - len(part) for part in parts]
    seconds = [float(len(part)) for part in parts]
    reports = moment(
        9, len(parts), train=[totals_of(part) for part in parts], ids_digest=digests, seconds=seconds,
        objective_nats=seconds,
    )  # fmt: skip
    ledger_of(run).add([[Report.from_dict(report.to_dict()) for report in reports]])
    (row,) = read_rows(run)
    everyone = [nats for part in parts for nats in part]
    assert (row["images"], row["negative_bound_nats"]) == (len(everyone), sum(everyone))
    assert row["ids_digest"] == f"{sum(digests) % 2**64:016x}"
    assert row["seconds"] == max(seconds)
    assert LikelihoodTotals.from_dict(row).mean("negative_bound") == sum(everyone) / len(everyone)


def test_checkpoint_exists_once_the_last_worker_has_written_its_share() -> None:
    run = new_run()
    ledger = ledger_of(run, test_images=3)
    files = saved_by(run, 10, 2)
    ledger.add([moment(10, 2, held_out=[totals_of([7]), totals_of([1, 1])])])
    ledger.add([moment(20, 2, saved=[files[0], {}])])
    assert recorded_images(run) == []
    ledger.add([moment(30, 2, saved=[{}, files[1]])])
    record = read_record(run, 10)
    assert [file.key for file in record.files] == ["states/10/0", "states/10/1"]
    assert record.held_out is not None
    assert (record.held_out["images"], record.held_out["negative_bound_nats"]) == (3, 9.0)


def test_shares_of_a_lost_group_of_workers_never_become_a_checkpoint() -> None:
    run = new_run()
    ledger = ledger_of(run)
    old, new = saved_by(run, 10, 2), saved_by(run, 10, 2)
    ledger.add([moment(20, 2, attempt="1", saved=[old[0], {}])])
    ledger.add([moment(20, 2, attempt="2", saved=[{}, new[1]])])
    assert recorded_images(run) == []
    ledger.add([moment(30, 2, attempt="2", saved=[new[0], {}])])
    assert read_record(run, 10).attempt == "2"


def test_newest_and_best_checkpoints_are_kept_and_nothing_else() -> None:
    run = new_run()
    job = JOB.model_copy(update={"checkpoint": JOB.checkpoint.model_copy(update={"keep_last": 2, "keep_best": 1})})
    ledger = ledger_of(run, job=job, test_images=1)
    for images_seen, nats in ((10, 9), (20, 3), (30, 5), (40, 8), (50, 7)):
        saved = saved_by(run, images_seen, 1)
        ledger.add([moment(images_seen, 1, held_out=[totals_of([nats])], saved=saved)])
    assert recorded_images(run) == [20, 40, 50]
    assert run.keys("states/") == ["states/20/0", "states/40/0", "states/50/0"]


def test_held_out_pass_that_missed_an_image_is_refused() -> None:
    run = new_run()
    with pytest.raises(CheckpointError, match="saw 2 images, the manifest has 3"):
        ledger_of(run, test_images=3).add([moment(10, 2, held_out=[totals_of([1]), totals_of([1])])])
    assert read_rows(run) == []


def test_history_counts_no_image_twice_after_a_restart() -> None:
    run = new_run()
    first = ledger_of(run)
    for images_seen in (10, 20, 30):
        first.add([moment(images_seen, 1, attempt="1", train=[totals_of([1] * 10)])])
    second = ledger_of(run)  # went on from a checkpoint at 10, with other reports
    for images_seen in (25, 40):
        second.add([moment(images_seen, 1, attempt="2", started_at=10, train=[totals_of([1] * 15)])])
    rows = read_rows(run)
    assert [(row["attempt"], row["images_seen"]) for row in rows] == [("1", 10), ("2", 25), ("2", 40)]
    assert sum(row["images"] for row in rows) == 40


def test_events_are_told_in_their_order() -> None:
    run = new_run()
    told: list[Event] = []
    ledger = ledger_of(run)
    ledger._on_event = told.append
    ledger.add([moment(10, 1, train=[totals_of([4])], saved=saved_by(run, 10, 1), notes=[("passed over",)])])
    assert [event.kind for event in told] == ["row", "note", "record"]


def test_row_tells_of_the_steps_that_every_worker_took_or_skipped() -> None:
    run = new_run()
    steps = {"steps": 7, "skipped_steps": 2, "non_finite_steps": 1, "gradient_norms": 2.5, "halvings": 1}
    both = {name: [value, value] for name, value in steps.items()}
    nats = [totals_of([1]), totals_of([1])]
    ledger_of(run).add([moment(9, 2, train=nats, replica_checksum=[2**64 - 1] * 2, **both)])
    (row,) = read_rows(run)
    assert {name: row[name] for name in steps} == steps
    assert row["replica_checksum"] == "f" * 16


@pytest.mark.parametrize(
    ("checksums", "says"),
    [
        ([1, 2], "the weights of worker 1 of 2 differ from those of worker 0 at 20 images seen"),
        ([3, 1, 1, 4, 1], "the weights of workers 0, 3 of 5 differ from those of worker 1 at 20 images seen"),
    ],
)
def test_workers_that_no_longer_hold_the_same_weights_end_the_job(checksums: list[int], says: str) -> None:
    run, ranks = new_run(), len(checksums)
    ledger = ledger_of(run)
    good = moment(10, ranks, train=[totals_of([1])] * ranks, replica_checksum=[5] * ranks)
    bad = moment(20, ranks, train=[totals_of([1])] * ranks, replica_checksum=checksums, saved=saved_by(run, 20, ranks))
    with pytest.raises(ClusterError, match=says) as refusal:
        ledger.add([good, bad])
    assert "\n" not in str(refusal.value)
    assert recorded_images(run) == []


def test_attempts_told_of_together_are_kept_apart() -> None:
    """A job that goes back begins another attempt; both may reach the ledger in one message."""
    run = new_run()
    diverged = [moment(n, 1, attempt="1", train=[totals_of([1] * 10)]) for n in (10, 20, 30)]
    again = [moment(n, 1, attempt="2", started_at=10, train=[totals_of([2] * 10)]) for n in (20, 30)]
    ledger_of(run).add([*diverged, *again])
    assert [(row["attempt"], row["images_seen"]) for row in read_rows(run)] == [("1", 10), ("2", 20), ("2", 30)]


def test_history_older_than_a_column_is_read() -> None:
    run = new_run()
    ledger_of(run).add([moment(10, 1, train=[totals_of([1])])])
    (key,) = run.keys("metrics/")
    table = pq.read_table(io.BytesIO(run.read(key))).drop_columns(["steps", "skipped_steps", "replica_checksum"])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    run.write(key, sink.getvalue())
    (row,) = read_rows(run)
    assert row["images"] == 1
    assert row.get("skipped_steps") is None


def test_reports_share_files_and_each_stands_in_the_history_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaejob.training.ledger, "ROWS_OF_A_FILE", 4)
    run = new_run()
    ledger = ledger_of(run)
    told: list[tuple[str, int]] = []
    for attempt, messages in (("1", [[1, 2], [3], [4, 5, 6], [7], [8]]), ("2", [[9], [10], [11]]), ("3", [[12]])):
        for message in messages:
            ledger.add([moment(n, 1, attempt=attempt, started_at=n - 1, train=[totals_of([n])]) for n in message])
            told += [(attempt, n) for n in message]
            assert [(row["attempt"], row["images_seen"]) for row in read_rows(run)] == told
    files = [pq.read_table(io.BytesIO(run.read(key))).column("images_seen").to_pylist() for key in run.keys("metrics/")]
    assert files == [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11], [12]]


THREADS = """
import os, sys
from vaejob.storage.runs import parse_rows
data = sys.stdin.buffer.read()
before = os.listdir("/proc/self/task")
rows = parse_rows(data)[1]
print(len(rows), os.listdir("/proc/self/task") == before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_rows_are_read_by_no_thread_that_could_outlive_the_interpreter() -> None:
    run = new_run()
    ledger_of(run).add([moment(10, 1, train=[totals_of([1])])])
    data = run.read(run.keys("metrics/")[0])
    done = subprocess.run([sys.executable, "-c", THREADS], input=data, capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().split() == ["1", "True"]
