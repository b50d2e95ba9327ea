"""One rank of a job inside a Ray Train worker."""

import os
import platform
import threading
import time
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from vaejob.cluster.board import Beat, Word
from vaejob.config import JobConfig
from vaejob.run import work
from vaejob.storage.retry import retries_so_far
from vaejob.training.worker import Report, Told, moved, moves_so_far, waits_for

SECONDS_BETWEEN_MESSAGES = 1.0
SECONDS_BETWEEN_QUESTIONS = 1.0
SECONDS_BETWEEN_BEATS = 1.0


class StartAgain(Exception):  # noqa: N818 - a state of the workers
    """Raised by all workers once their checkpoint is committed, for Ray Train to start them anew; no failure."""


class RayWorker:
    """Fills in the loop's view of the world from Ray's context."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.processes_here = context.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._board = board
        self._group = ray.get_runtime_context().get_placement_group_id() or ""
        self._reports: list[Report] = []
        self._last: Report | None = None
        self._state_read = (0, 0)
        self._sent_at = time.monotonic()
        self._asked_at = float("-inf")
        self._every = self._to_go = 1
        self._word = Word(stop=False, start_again=None)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def report(self, report: Report) -> None:
        """Reports travel together about once a second: Ray's controller takes one message at each of its polls."""
        self._reports.append(report)
        if report.last or self.told_by_first(time.monotonic() - self._sent_at > SECONDS_BETWEEN_MESSAGES):
            message = {"reports": [report.to_dict() for report in self._reports]}
            # The other modes make this wait, for the controller's poll or for an upload; ASYNC never does.
            ray.train.report(message, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            self._reports = []
            self._sent_at = time.monotonic()
        if report.last:
            self._last = report

    def reading(self, done: int, total: int) -> None:
        self._state_read = (done, total)

    def told_by_first(self, value: Told) -> Told:
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def should_stop(self) -> bool:
        """The board and Ray are asked about once a second, which rank 0 puts as a number of batches."""
        self._to_go -= 1
        if self._to_go == 0:
            drained = ray.train.get_preemption_info()  # rank 0's word too
            word, self._every = self.told_by_first(self._ask() if self.rank == 0 else (self._word, 1))
            if drained is not None and word.start_again is None:
                ranks = ", ".join(str(rank) for rank in drained.preempted_ranks)
                word = word._replace(start_again=f"the cluster takes back the node of worker {ranks}")
            self._word, self._to_go = word, self._every
        return self._word.stop or self._word.start_again is not None

    def start_again_if_asked(self, *, until: int) -> None:
        """Raises StartAgain if that was why it stopped, once the ledger has all that was reported."""
        if self._word.stop or self._word.start_again is None or (self._last and self._last.images_seen >= until):
            return
        where = "before the first batch"
        if self._last is not None:
            where = f"at {self._last.images_seen:,} images seen"
            while not ray.get(self._board.has_written_last_of.remote(self._last.attempt)):
                moved(self._last.images_seen)
                time.sleep(0.1)
        raise StartAgain(f"{self._word.start_again}: a checkpoint is kept, and the workers start again {where}")

    def _ask(self) -> tuple[Word, int]:
        """Of rank 0: the board's word, and the number of batches until the next question."""
        word = ray.get(self._board.word_for.remote(self._group))
        now = time.monotonic()
        every = int(self._every * SECONDS_BETWEEN_QUESTIONS / (now - self._asked_at))
        self._asked_at = now
        return word, max(1, min(every, 2 * self._every))

    def _beat(self) -> None:
        """From a thread of its own: it goes on where the work hangs, and stops where the whole process does."""
        host, node = platform.node(), ray.get_runtime_context().get_node_id()
        started_at = moves_so_far().batches
        while True:
            moves = moves_so_far()
            count = moves.batches - started_at + retries_so_far().total()
            beat = Beat(
                self._group,
                self.rank,
                self.world_size,
                os.getpid(),
                node,
                host,
                moves=count,
                images_seen=moves.images_seen,
                waits_for=waits_for(),
                state_read=self._state_read,
            )
            self._board.beat.remote(beat)
            time.sleep(SECONDS_BETWEEN_BEATS)


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    job = JobConfig.model_validate(settings["job"])
    worker = RayWorker(settings["board"])
    if not worker.should_stop():
        work(job, worker)
    worker.start_again_if_asked(until=job.training.images)
