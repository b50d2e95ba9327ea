"""From measured passes to figures: what was delivered, medians over rounds, ratios within a round. Pure functions."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.benchmarks.peers.loader import BATCH
from tests.benchmarks.peers.task import Measured

FETCH, DECODE = "bare GETs", "bare decoding"
CEILINGS = (FETCH, DECODE)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a case is read."""

    source: str
    """cold: from the bucket with nothing kept; warm: from the local disk; resume: cold, from half of the epoch."""
    workers: int

    def __str__(self) -> str:
        return self.source + (f", {self.workers} workers" if self.workers else "")


COLD = Setting(source="cold", workers=0)
WARM = Setting(source="warm", workers=0)
RESUME = Setting(source="resume", workers=0)
PASSES = (COLD, Setting(source="cold", workers=2), WARM, Setting(source="warm", workers=2))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One pass of one round."""

    case: str
    setting: Setting
    loader: str
    round: int
    measured: Measured

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.measured.images / self.measured.wall_seconds

    @property
    def cpu_us(self) -> float:
        """CPU microseconds an image."""
        return self.measured.cpu_seconds / self.measured.images * 1e6

    @property
    def first_batch(self) -> float:
        return self.measured.first_batch_seconds

    @property
    def peak_mb(self) -> float:
        return self.measured.peak_rss_mb


class Delivery(NamedTuple):
    """An epoch, held against the source."""

    missing: int
    repeated: int
    foreign: int
    """Images that the source does not have: wrongly decoded."""
    mixing: float
    """How widely a batch is drawn from the source; 1 is a true shuffle, 0 the source's order."""

    def __str__(self) -> str:
        wrong = {"missing": self.missing, "repeated": self.repeated, "wrong": self.foreign}
        return ", ".join(f"{count:,} {what}" for what, count in wrong.items() if count) or "each once"


class Spread(NamedTuple):
    """A figure over rounds."""

    median: float
    least: float
    most: float


def delivery(source: np.ndarray, listed: np.ndarray) -> Delivery:
    """Both are pixel hashes in order; the source may hold an image twice."""
    known, first_places, wanted = np.unique(source, return_index=True, return_counts=True)
    nearest = np.minimum(np.searchsorted(known, listed), len(known) - 1)
    is_known = known[nearest] == listed
    had = np.bincount(nearest[is_known], minlength=len(known))
    places = first_places[nearest[is_known]]
    return Delivery(
        missing=int(np.maximum(wanted - had, 0).sum()),
        repeated=int(np.maximum(had - wanted, 0).sum()),
        foreign=int((~is_known).sum()),
        mixing=mixing(places / len(source)),
    )


def mixing(places: np.ndarray) -> float:
    """Cut the source into as many stretches as a batch has images: the part that a batch touches, to that by chance."""
    if len(places) <= BATCH:
        return 0.0
    batches = [places[first : first + BATCH] for first in range(0, len(places) - BATCH + 1, BATCH)]
    hit = [len(np.unique((batch * BATCH).astype(int))) / BATCH for batch in batches]
    by_chance = 1 - (1 - BATCH / len(places)) ** (len(places) / BATCH)
    return float(np.mean(hit) / by_chance)


def spread(values: Iterable[float]) -> Spread | None:
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def chosen(records: Iterable[Record], *, case: str, setting: Setting, loaders: Sequence[str]) -> list[Record]:
    return [r for r in records if r.case == case and r.setting == setting and r.loader in loaders]


def in_round_ratios(
    ours: Sequence[Record], others: Sequence[Record], *, figure: Callable[[Record], float], best: Callable[..., float]
) -> Spread | None:
    """Ours over the best of the others, in each round that has both."""
    ratios = []
    for own in ours:
        if rivals := [figure(other) for other in others if other.round == own.round]:
            ratios.append(figure(own) / best(rivals))
    return spread(ratios)
