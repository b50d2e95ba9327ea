"""What the driver sees to while Ray Train runs the workers: that none hangs, and that they become more where there is room."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vaejob.cluster.board import Beat, Seen
from vaejob.cluster.join import first_line
from vaejob.config import ClusterConfig
from vaejob.errors import ClusterError
from vaejob.training.worker import Event, reading

BOARD_SECONDS = 60
SILENT_SECONDS = 10
"""Without a beat in so long, a process does nothing at all: it is the one that its peers wait for."""
START_PATIENCE = 4
"""Times cluster.hang_seconds until the first batch of a group: state, compiler and connections come before it."""
SETTLE_SECONDS = 25
"""Room must last: Ray Train decides by a picture of the cluster that is up to 20 s old."""


class Watch:
    """Looks at the board twice a second."""

    def __init__(self, config: ClusterConfig, board: Any, *, on_event: Callable[[Event], None]) -> None:
        self._config, self._board, self._on_event = config, board, on_event
        self._growth = Growth(config)
        self._world_size = 0
        self._waiting = False
        self._state_read = (0, 0)
        self.workers_seen_at = time.monotonic()
        """When there were workers last that could save a checkpoint, had they been asked to."""

    def look(self) -> None:
        """Passes on what was posted. Raises ClusterError if the cluster is gone."""
        try:
            events, workers = ray.get(
                [self._board.take_events.remote(), self._board.workers.remote()], timeout=BOARD_SECONDS
            )
            for event in events:
                self._on_event(event)
            self._look_at(workers)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the cluster was lost: {first_line(error)}; repeat the command to continue the run"
            ) from error

    def _look_at(self, workers: list[Seen]) -> None:
        world_size = workers[0].beat.world_size if workers else 0
        waiting = [seen.beat for seen in workers if seen.beat.waits_for and seen.silent_seconds < SILENT_SECONDS]
        if waiting and not self._waiting:
            self._on_event(Event("note", {"text": f"{waiting[0]} waits for images: {waiting[0].waits_for}"}))
        self._waiting = bool(waiting)
        state_read = max((seen.beat.state_read for seen in workers), default=(0, 0))  # only the first reads it
        if state_read != self._state_read:
            self._state_read = state_read
            self._on_event(reading(*state_read))
        if workers:
            if not waiting:
                self.workers_seen_at = time.monotonic()
            if self._world_size not in (0, world_size):
                self._on_event(
                    Event("status", {"text": f"going on with {world_size} of {self._config.most_workers} workers"})
                )
            self._world_size = world_size
        if hung := hung_among(workers, hang_seconds=self._config.hang_seconds):
            self._end(hung)
        elif self._growth.is_time(world_size):
            why = f"there is room for more than {world_size} of {self._config.most_workers} workers"
            self._board.ask_start_again.remote(workers[0].beat.group, why)

    def _end(self, hung: list[Seen]) -> None:
        """Kills workers that hang; Ray Train finds them dead, and starts the group again."""
        for beat, still_seconds, _ in hung:
            where = f"at {beat.images_seen:,} images seen" if beat.moves else "and has not come to its first batch"
            text = f"{beat} has not moved for {still_seconds:.0f} s {where}: it is killed, and the workers start again"
            self._on_event(Event("note", {"text": text}))
            there = NodeAffinitySchedulingStrategy(beat.node_id, soft=False)
            _kill.options(scheduling_strategy=there).remote(beat)
        self._board.dismiss.remote()


def hung_among(workers: list[Seen], *, hang_seconds: float) -> list[Seen]:
    """Those that keep a group from moving: the silent ones, else all, for the same collective holds the guilty and the others."""
    still = [seen for seen in workers if seen.still_seconds > hang_seconds * (1 if seen.beat.moves else START_PATIENCE)]
    return [seen for seen in still if seen.silent_seconds > SILENT_SECONDS] or still


@ray.remote(num_cpus=0, max_retries=0)
def _kill(beat: Beat) -> None:
    """On the worker's node. SIGKILL ends a stopped process too; Ray's own ways ask the process."""
    command = Path(f"/proc/{beat.pid}/cmdline")
    if not command.parents[1].exists() or (command.exists() and b"RayTrainWorker" in command.read_bytes()):
        os.kill(beat.pid, signal.SIGKILL)


class Growth:
    """Keeps asking Ray for one more worker's place while an elastic job has fewer workers than it may have.

    Ray Train's own way of growing ends workers that have not saved; here they are asked to, and to start again.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._place: PlacementGroup | None = None
        self._ready_at: float | None = None
        self._grew_from = 0
        self._settle_seconds = float(SETTLE_SECONDS)

    def is_time(self, world_size: int) -> bool:
        """Whether to start again with more workers than world_size; 0: none are there now."""
        if not 0 < world_size < self._config.most_workers:
            self._let_go()
            return False
        if self._place is None:
            self._place = placement_group([bundle(self._config)])
        if placement_group_table(self._place)["state"] != "CREATED":
            self._ready_at = None
            return False
        self._ready_at = self._ready_at or time.monotonic()
        if time.monotonic() - self._ready_at < self._settle_seconds:
            return False
        # If it was in vain the last time, the place is one that Ray Train cannot use, and the next try is to be rarer.
        self._settle_seconds = 4 * self._settle_seconds if self._grew_from == world_size else float(SETTLE_SECONDS)
        self._grew_from = world_size
        self._let_go()
        return True

    def _let_go(self) -> None:
        if self._place is not None:
            remove_placement_group(self._place)
        self._place = self._ready_at = None


def bundle(config: ClusterConfig) -> dict[str, float]:
    """What one worker takes of a node."""
    resources = {"CPU": float(config.cpus_per_worker)}
    if config.gpus_per_worker:
        resources["GPU"] = float(config.gpus_per_worker)
    return resources
