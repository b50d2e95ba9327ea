"""Where the driver's process, the controller and the workers leave word for one another."""

import time
from typing import NamedTuple

from vaejob.training.worker import Event


class Beat(NamedTuple):
    """What a worker says of itself every second, from a thread beside its work."""

    group: str
    """Of workers that were started together."""
    rank: int
    world_size: int
    pid: int
    node_id: str
    host: str
    moves: int
    """Batches that it has trained or scored, and requests that it has repeated; 0 before the first."""
    images_seen: int
    waits_for: str = ""
    """What keeps the images from it."""
    state_read: tuple[int, int] = (0, 0)
    """Bytes of the state to go on from that have come, of how many."""

    def __str__(self) -> str:
        return f"worker {self.rank} (pid {self.pid} on {self.host})"


class Seen(NamedTuple):
    """A worker as the board knows it."""

    beat: Beat
    still_seconds: float
    """Since it moved last."""
    silent_seconds: float
    """Since its last beat."""


class Word(NamedTuple):
    """What the workers of a group are asked for."""

    stop: bool
    """To save a checkpoint and end."""
    start_again: str | None
    """To save a checkpoint and be started again, and why."""


class Board:
    """An actor without resources. Only one group of workers is known at a time: the newest that has beaten."""

    def __init__(self) -> None:
        self._stop = False
        self._start_again: dict[str, str] = {}
        self._events: list[Event] = []
        self._written: str | None = None
        self._group = self._gone = ""
        self._workers: dict[int, tuple[Beat, float, float]] = {}

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take_events(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken

    def ask_stop(self) -> None:
        self._stop = True

    def ask_start_again(self, group: str, why: str) -> None:
        self._start_again[group] = why

    def word_for(self, group: str) -> Word:
        return Word(self._stop, self._start_again.get(group))

    def wrote_last_of(self, attempt: str) -> None:
        """All that the attempt reported is in the bucket."""
        self._written = attempt

    def has_written_last_of(self, attempt: str) -> bool:
        return self._written == attempt

    def beat(self, beat: Beat) -> None:
        if beat.group == self._gone:
            return
        if beat.group != self._group:
            self._group, self._workers = beat.group, {}
        now = time.monotonic()
        before, moved_at, _ = self._workers.get(beat.rank, (None, now, now))
        if before is None or (before.moves, before.state_read) != (beat.moves, beat.state_read):
            moved_at = now
        self._workers[beat.rank] = (beat, moved_at, now)
        if beat.waits_for:  # its peers stand still with it; none of them hangs, nor right after the wait
            self._workers = {rank: (last, now, beaten_at) for rank, (last, _, beaten_at) in self._workers.items()}

    def workers(self) -> list[Seen]:
        now = time.monotonic()
        return [
            Seen(beat, now - moved_at, now - beaten_at)
            for _, (beat, moved_at, beaten_at) in sorted(self._workers.items())
        ]

    def dismiss(self) -> dict[int, Beat]:
        """Forgets the group, which is to go or has failed, and does not listen to it again; who was in it."""
        who = {rank: beat for rank, (beat, _, _) in self._workers.items()}
        self._gone, self._workers = self._group, {}
        return who
