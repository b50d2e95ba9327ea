"""Which samples each rank sees, as a pure function of how many images were seen.

An epoch lays the data set's N rows out anew: row groups are permuted by a hash and laid end to end; that sequence is cut
into L lanes whose lengths differ by at most one; position p of the epoch is lane p mod L, offset p div L; inside a lane a
hash displaces each row by less than R rows. A global batch is the next B positions; sorted lane by lane and cut into W
near-equal parts it gives each rank its own lanes. Nothing is stored, drawn from a stream, or shared between processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

IMAGES_AT_ONCE = 4096
"""Whose ids are looked up together, in one go for several small batches."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea & Flood, 2014): a bijection of 64-bit integers; uint64 in, uint64 out."""
    z = values.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_of(*parts: int) -> int:
    """One 64-bit hash of a few integers, in their order."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state + np.uint64((part * _GOLDEN + 1) & _MASK))
    return int(state[0])


def _hashes(key: int, indices: np.ndarray) -> np.ndarray:
    return mix(indices.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def ids_digest(ids: np.ndarray, *, epoch: int) -> int:
    """A 64-bit sum over samples that tells which were seen, in whatever parts: digests add up modulo 2^64."""
    return int(_hashes(_key_of(epoch), ids).sum(dtype=np.uint64))


@lru_cache(maxsize=8)
def _key_of(epoch: int) -> int:
    return hash_of(epoch)


class GlobalBatch(NamedTuple):
    """One optimisation step's stretch of an epoch."""

    epoch: int
    start: int
    """First position of the epoch; the batch is positions [start, stop)."""
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start


def global_batches(*, num_images: int, global_batch: int, images_seen: int, until: int) -> Iterator[GlobalBatch]:
    """The batches from images_seen on: the last of an epoch may be smaller, and the last of all ends at `until`."""
    while images_seen < until:
        epoch, start = divmod(images_seen, num_images)
        stop = min(start + global_batch, num_images, start + until - images_seen)
        yield GlobalBatch(epoch, start, stop)
        images_seen += stop - start


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The lanes of any epoch: arithmetic on (rows, lanes) alone."""

    num_images: int
    lanes: int

    @classmethod
    def of(cls, *, num_images: int, lanes: int) -> Self:
        return cls(num_images=num_images, lanes=min(lanes, num_images))

    def lane_start(self, lane: int) -> int:
        """First row of the lane in the epoch's sequence."""
        short, longer = divmod(self.num_images, self.lanes)
        return lane * short + min(lane, longer)

    def lane_rows(self, lane: int) -> int:
        return self.lane_start(lane + 1) - self.lane_start(lane)

    def rank_stretches(self, batches: list[GlobalBatch], *, rank: int, world_size: int) -> tuple[Rows, Rows, Rows]:
        """The rank's parts of some batches: lanes, and of each its first offset and the one after its last, batch by batch.

        Parts of all ranks, one after another, are a batch; their sizes differ by at most one.
        """
        starts, stops = (
            np.array(positions)[:, None] for positions in zip(*(batch[1:] for batch in batches), strict=True)
        )
        first, end = ((stops - starts) * part // world_size for part in (rank, rank + 1))
        # Position p is lane p mod L, offset p div L: of each lane, the offsets [low, high) are in a batch.
        lanes = np.arange(self.lanes)
        low, high = (-((lanes - positions) // self.lanes) for positions in (starts, stops))
        before = np.cumsum(high - low, axis=1) - (high - low)  # images of the batch in the lanes before
        cut_low = low + np.maximum(first - before, 0)
        cut_high = np.minimum(low + end - before, high)
        own = np.flatnonzero(cut_low < cut_high)
        return own % self.lanes, cut_low.ravel()[own], cut_high.ravel()[own]


class EpochOrder:
    """The order of one epoch, of which any stretch of any lane can be computed by itself."""

    def __init__(self, *, row_group_rows: np.ndarray, layout: Layout, window_rows: int, seed: int, epoch: int) -> None:
        self.layout = layout
        self.window_rows = window_rows
        self._key = hash_of(seed, epoch)
        group_keys = _hashes(hash_of(self._key, 0), np.arange(len(row_group_rows)))
        laid = np.argsort(group_keys, kind="stable")  # row groups, in the order they are laid end to end
        self._laid_start: Rows = np.concatenate([[0], np.cumsum(row_group_rows[laid])])
        self._first_row: Rows = (np.cumsum(row_group_rows) - row_group_rows)[laid]

    def lane_offsets(self, lane: int, start: int, stop: int) -> Rows:
        """Rows of the undisplaced lane, in displaced order, at offsets [start, stop); shape [stop - start], int64.

        Row i has the key i + h(i) R / 2^32; the row of rank r has its key in [r, r + R), so only rows less than R away
        can be there, and no row before those can come after it.
        """
        window = self.window_rows
        low, high = max(0, start - window + 1), min(self.layout.lane_rows(lane), stop + window - 1)
        rows = np.arange(low, high, dtype=np.int64)
        hashes = (_hashes(hash_of(self._key, 1, lane), rows) >> np.uint64(32)).astype(np.int64)
        by_key = np.argsort(((rows - low) << 32) + hashes * window, kind="stable")
        return rows[by_key[start - low : stop - low]]

    def rows(self, lane: int, start: int, stop: int) -> Rows:
        """Sample ids (rows of the data set) at the lane's offsets [start, stop); shape [stop - start], int64."""
        laid = self.layout.lane_start(lane) + self.lane_offsets(lane, start, stop)
        place = np.searchsorted(self._laid_start, laid, side="right") - 1
        return self._first_row[place] + laid - self._laid_start[place]


class _LanesAhead:
    """The sample ids of an epoch's lanes, each computed a few windows ahead of its use."""

    def __init__(self, order: EpochOrder, *, most_at_once: int) -> None:
        self._order = order
        lanes, self._ahead = order.layout.lanes, 4 * order.window_rows
        width = min(max(self._ahead, most_at_once), order.layout.lane_rows(0))
        self._ids = np.empty((lanes, width), dtype=np.int64)
        self._first, self._end = np.zeros(lanes, dtype=np.int64), np.zeros(lanes, dtype=np.int64)

    def ids(self, lanes: Rows, low: Rows, high: Rows) -> Rows:
        """The ids at the offsets [low, high) of each lane, one after the other; a lane may come again, further on."""
        for lane in np.unique(lanes[(low < self._first[lanes]) | (high > self._end[lanes])]).tolist():
            here = lanes == lane
            self._compute(lane, int(low[here].min()), int(high[here].max()))
        counts = high - low
        columns = np.arange(counts.sum()) + np.repeat(low - self._first[lanes] - (np.cumsum(counts) - counts), counts)
        ids: Rows = self._ids[np.repeat(lanes, counts), columns]
        return ids

    def _compute(self, lane: int, low: int, high: int) -> None:
        # The first stretches differ in length, so that not all lanes run out at once.
        ahead = self._ahead if self._end[lane] else self._ahead * (lane + 1) // len(self._end)
        end = min(max(high, low + ahead), self._order.layout.lane_rows(lane))
        self._ids[lane, : end - low] = self._order.rows(lane, low, end)
        self._first[lane], self._end[lane] = low, end


class RankPlan:
    """The sample ids of one rank's batches from images_seen on, computed a stretch of each lane at a time."""

    def __init__(
        self,
        *,
        row_group_rows: np.ndarray,
        global_batch: int,
        lanes: int,
        window_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._row_group_rows = row_group_rows
        self._num_images = int(row_group_rows.sum())
        self._global_batch = global_batch
        self._layout = Layout.of(num_images=self._num_images, lanes=lanes)
        self._window_rows = window_rows
        self._seed = seed
        self._rank, self._world_size = rank, world_size

    def batches(self, *, images_seen: int, until: int) -> Iterator[tuple[GlobalBatch, np.ndarray]]:
        """Each global batch with the rank's sample ids of it, which may be none; ends once `until` images are seen."""
        all_batches = global_batches(
            num_images=self._num_images, global_batch=self._global_batch, images_seen=images_seen, until=until
        )
        most = max(1, IMAGES_AT_ONCE // self._global_batch)
        for epoch, of_epoch in groupby(all_batches, key=lambda batch: batch.epoch):
            most_at_once = most * self._global_batch // self._layout.lanes + 2
            ahead = _LanesAhead(self.epoch_order(epoch), most_at_once=most_at_once)
            while batches := list(islice(of_epoch, most)):
                ids = ahead.ids(*self._layout.rank_stretches(batches, rank=self._rank, world_size=self._world_size))
                for batch in batches:
                    share = self._share(batch)
                    yield batch, ids[:share]
                    ids = ids[share:]

    def _share(self, batch: GlobalBatch) -> int:
        """Images of a batch that are the rank's."""
        return batch.images * (self._rank + 1) // self._world_size - batch.images * self._rank // self._world_size

    def epoch_order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            row_group_rows=self._row_group_rows,
            layout=self._layout,
            window_rows=self._window_rows,
            seed=self._seed,
            epoch=epoch,
        )
