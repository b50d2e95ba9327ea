"""One rank of a job inside a Ray Train worker."""

import time
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from vaejob.config import JobConfig
from vaejob.errors import UserError
from vaejob.run import work
from vaejob.training.worker import Event, Report, Told

SECONDS_BETWEEN_MESSAGES = 1.0


class RayWorker:
    """Fills in the loop's view of the world from Ray's context."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._board = board
        self._reports: list[Report] = []
        self._sent_at = time.monotonic()

    def report(self, report: Report) -> None:
        """Reports travel together about once a second: Ray's controller takes one message at each of its polls."""
        self._reports.append(report)
        if report.last or self.told_by_first(time.monotonic() - self._sent_at > SECONDS_BETWEEN_MESSAGES):
            message = {"reports": [report.to_dict() for report in self._reports]}
            # The other modes make this wait, for the controller's poll or for an upload; ASYNC never does.
            ray.train.report(message, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            self._reports = []
            self._sent_at = time.monotonic()

    def told_by_first(self, value: Told) -> Told:
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def should_stop(self) -> bool:
        return self.told_by_first(ray.get(self._board.stop_asked.remote()) if self.rank == 0 else False)


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    board = settings["board"]
    try:
        work(JobConfig.model_validate(settings["job"]), RayWorker(board))
    except UserError as error:
        # Ray would start the workers again, which cannot mend the input: the driver ends the job instead.
        ray.get(board.post.remote(failure(error)))
        raise


def failure(error: Exception) -> Event:
    """An error as the driver's process is told of it."""
    return Event(
        "failure", {"error": type(error).__name__, "text": (str(error) or type(error).__name__).splitlines()[0]}
    )
