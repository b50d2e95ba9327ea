"""A worker that hangs, or dies without a word, is found, named and started again; nothing is lost."""

import signal
import time
from pathlib import Path

import pytest

from tests.job.conftest import Vaejob, kill_tree
from tests.job.nodes import Job, worker_processes
from tests.job.test_resume import batches_seen
from vaejob.cluster.board import Beat, Board, Seen
from vaejob.cluster.watch import SILENT_SECONDS, START_PATIENCE, Watch, hung_among
from vaejob.config import ClusterConfig
from vaejob.training.worker import Event, reading


def beat(rank: int, *, moves: int = 5, group: str = "one", images_seen: int = 640) -> Beat:
    return Beat(group, rank, 3, 100 + rank, "node", "host", moves=moves, images_seen=images_seen)


def seen(rank: int, *, still: float, silent: float = 0.5, moves: int = 5) -> Seen:
    return Seen(beat(rank, moves=moves), still, silent)


def test_the_silent_worker_is_hung_and_not_its_peers_that_wait_for_it() -> None:
    waiting, stopped = seen(0, still=31), seen(1, still=31, silent=31)
    assert hung_among([waiting, stopped, seen(2, still=31)], hang_seconds=30) == [stopped]


def test_workers_that_all_beat_and_none_of_which_moves_are_all_hung() -> None:
    workers = [seen(rank, still=31) for rank in range(3)]
    assert hung_among(workers, hang_seconds=30) == workers


def test_a_group_has_more_time_for_its_first_batch() -> None:
    slow = [seen(rank, still=31, moves=0) for rank in range(3)]
    assert hung_among(slow, hang_seconds=30) == []
    stuck = [seen(rank, still=30 * START_PATIENCE + 1, moves=0) for rank in range(3)]
    assert hung_among(stuck, hang_seconds=30) == stuck


def test_silence_alone_is_no_hang() -> None:
    assert hung_among([seen(0, still=29, silent=SILENT_SECONDS + 1)], hang_seconds=30) == []


def test_who_waits_for_images_is_told_of_once_and_nobody_could_save_a_checkpoint() -> None:
    told: list[str] = []
    watch = Watch(
        ClusterConfig(workers=2, hang_seconds=30), None, on_event=lambda event: told.append(event.body["text"])
    )
    blocked = Seen(beat(1)._replace(waits_for="s3://b/0.parquet: gave up"), 0.5, 0.5)
    there_before = watch.workers_seen_at
    for _ in range(3):
        watch._look_at([seen(0, still=29), blocked])
    assert told == ["worker 1 (pid 101 on host) waits for images: s3://b/0.parquet: gave up"]
    assert watch.workers_seen_at == there_before
    watch._look_at([seen(0, still=1), seen(1, still=1)])
    assert watch.workers_seen_at > there_before
    assert len(told) == 1


def test_workers_are_not_still_while_one_of_them_waits_for_images_nor_right_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board()
    for second in range(100, 400):
        now = float(second)
        board.beat(beat(0))
        board.beat(beat(1)._replace(waits_for="s3://b/0.parquet: gave up"))
        assert hung_among(board.workers(), hang_seconds=30) == []
    for second in range(400, 430):
        now = float(second)
        board.beat(beat(0))
        board.beat(beat(1))
        assert hung_among(board.workers(), hang_seconds=30) == []
    now = 431.0
    board.beat(beat(0))
    board.beat(beat(1))
    assert len(hung_among(board.workers(), hang_seconds=30)) == 2


def test_bytes_of_the_state_that_the_first_worker_reads_are_passed_on() -> None:
    told: list[Event] = []
    watch = Watch(ClusterConfig(workers=2), board=None, on_event=told.append)
    for came in ((0, 0), (4, 9), (4, 9), (9, 9)):
        watch._look_at([seen(0, still=1)._replace(beat=beat(0)._replace(state_read=came)), seen(1, still=1)])
    assert told == [reading(4, 9), reading(9, 9)]


def test_board_measures_stillness_from_the_last_move_and_forgets_groups_that_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board()
    board.beat(beat(0, moves=1))
    now = 107.0
    board.beat(beat(0, moves=1))
    now = 110.0
    assert board.workers() == [(beat(0, moves=1), 10.0, 3.0)]
    board.beat(beat(0, moves=2))  # any batch, trained or scored
    assert board.workers() == [(beat(0, moves=2), 0.0, 0.0)]
    now = 120.0
    reads = beat(0, moves=2)._replace(state_read=(5, 9))  # a large state, slowly
    board.beat(reads)
    assert board.workers() == [(reads, 0.0, 0.0)]

    assert board.dismiss() == {0: reads}
    board.beat(beat(1))  # of a process that is yet to be ended
    assert board.workers() == []
    board.beat(beat(0, group="two", moves=0))
    assert [each.beat for each in board.workers()] == [beat(0, group="two", moves=0)]


@pytest.mark.ray
def test_stopped_worker_is_named_and_the_job_equals_an_undisturbed_one(
    vaejob: Vaejob, job_file: Path, tmp_path: Path
) -> None:
    arguments = [job_file, "training.images=60000"]
    before = {process.pid for process in worker_processes()}
    settings = ["run.name=stopped", "cluster.workers=2", "cluster.hang_seconds=12"]
    job = Job(*arguments, *settings, env={}, log=tmp_path / "log")
    try:
        job.wait_for_checkpoint(tmp_path / "runs/stopped")
        victim = next(process for process in worker_processes() if process.pid not in before)
        victim.send_signal(signal.SIGSTOP)
        assert job.ends() == 0, job.said
    finally:
        kill_tree(job.process.pid)
    line = next(line for line in job.said.splitlines() if "has not moved for" in line)
    assert f"(pid {victim.pid} on " in line
    assert " images seen: it is killed, and the workers start again" in line
    assert "continuing from the checkpoint at" in job.said
    assert "raylet" not in job.said  # what Ray prints of a dead worker, on stdout

    assert vaejob("train", *arguments, "cluster.workers=0", "run.name=whole").returncode == 0
    assert batches_seen(f"{tmp_path}/runs/stopped") == batches_seen(f"{tmp_path}/runs/whole")
