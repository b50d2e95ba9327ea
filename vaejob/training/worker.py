"""What the loop knows of the world around it: its rank, its device, where reports go, and whether to stop."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from vaejob.metrics import LikelihoodTotals
from vaejob.storage.patience import Patience
from vaejob.storage.retry import StoreDown
from vaejob.storage.runs import StateFile

Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One worker's sums since its last report. All workers report at the same images_seen, equally often."""

    images_seen: int
    attempt: str
    attempt_started_at_images: int
    rank: int
    world_size: int
    train: LikelihoodTotals = field(default_factory=LikelihoodTotals)
    objective_nats: float = 0.0
    ids_digest: int = 0
    learning_rate: float = 0.0
    halvings: int = 0
    """Times that the job went back to a checkpoint, each time at half the learning rate."""
    steps: int = 0
    skipped_steps: int = 0
    non_finite_steps: int = 0
    """Of the skipped, those whose gradient was not finite."""
    non_finite_in_a_row: int = 0
    """Such steps up to now without another among them, from before the last report if need be."""
    gradient_norms: float = 0.0
    """Sum of the norm of the global batch's gradient, before clipping, over the steps taken."""
    replica_checksum: int = 0
    """Of the bits of this worker's weights; the same on every worker."""
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    missing_images: int = 0
    """Damaged images that data.on_corrupt=skip left out."""
    retries: dict[str, int] = field(default_factory=dict)
    """Requests to the bucket that were repeated, by cause."""
    held_out: LikelihoodTotals | None = None
    """This worker's part of a held-out pass at images_seen."""
    saved: dict[int, StateFile] = field(default_factory=dict)
    """Files of states, by their images_seen, that this worker's uploads have finished since its last report."""
    notes: tuple[str, ...] = ()
    """What a person should be told, such as damage that was passed over."""
    last: bool = False
    """Nothing follows from this attempt."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for crossing processes."""
        plain = asdict(self)
        plain["saved"] = {images: file.model_dump() for images, file in self.saved.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Report":
        held_out = plain["held_out"]
        return cls(
            **{
                **plain,
                "train": LikelihoodTotals(**plain["train"]),
                "held_out": None if held_out is None else LikelihoodTotals(**held_out),
                "saved": {int(images): StateFile(**file) for images, file in plain["saved"].items()},
                "notes": tuple(plain["notes"]),
            }
        )


class Moves(NamedTuple):
    """How far the work of this process has come, for those who watch whether it goes on."""

    batches: int
    """Trained or scored."""
    images_seen: int


_moves = Moves(0, 0)


def moved(images_seen: int) -> None:
    """Says that the work goes on: after every batch, of training or of a held-out pass."""
    global _moves
    _moves = Moves(_moves.batches + 1, images_seen)


def moves_so_far() -> Moves:
    return _moves


_waits_for = ""
_waited: list[str] = []


def patience_with_images(seconds: float) -> Patience:
    """Of one process that trains, which can do nothing without images but wait: it says so while it does, and after."""

    def began(error: StoreDown) -> None:
        global _waits_for
        _waits_for = str(error)

    def ended(seconds: float) -> None:
        global _waits_for
        _waits_for = ""
        _waited.append(f"waited for images: their bucket was out of reach for {seconds:.0f} s")

    return Patience(seconds, on_outage=began, on_return=ended)


def waits_for() -> str:
    """What keeps the images from this process; empty where nothing does."""
    return _waits_for


def take_waited() -> list[str]:
    """What a person should be told of waits that are over, since this was last asked."""
    taken = _waited.copy()
    del _waited[: len(taken)]
    return taken


class Event(NamedTuple):
    """Something that happened to the job, told to whoever watches it."""

    kind: Literal["row", "record", "status", "note", "reading"]
    body: dict[str, Any]


def reading(done: int, total: int) -> Event:
    """Bytes of the state to go on from that have come, of how many."""
    return Event("reading", {"done": done, "total": total})


@runtime_checkable
class Worker(Protocol):
    """One rank of a job."""

    rank: int
    world_size: int
    processes_here: int
    """Workers of the job on this machine, which share its cores."""
    device: torch.device

    def report(self, report: Report) -> None:
        """Hands the sums to the driver without waiting for it."""
        ...

    def reading(self, done: int, total: int) -> None:
        """Hears from any thread how many bytes of the state to go on from, of how many, have come."""
        ...

    def told_by_first(self, value: Told) -> Told:
        """Rank 0's value, on every rank; all ranks call it."""
        ...

    def should_stop(self) -> bool:
        """Whether the job was asked to stop; the same answer on every rank, and all ranks ask after every batch."""
        ...
