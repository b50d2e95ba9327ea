"""A data set's images as uint8 batches: in training order for one rank, or each once for evaluation."""

import hashlib
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vaejob.config import DataConfig
from vaejob.data.cache import DiskCache
from vaejob.data.groups import RowGroups
from vaejob.data.manifest import Manifest, read_manifest, read_row_groups
from vaejob.data.order import GlobalBatch, RankPlan
from vaejob.data.reader import GROUPS_AHEAD, RowGroupReader
from vaejob.errors import DataError
from vaejob.storage import Bucket, open_bucket
from vaejob.storage.patience import Patience

EVALUATION_BLOCK = 256
"""Images evaluated together. Fixed, so that an image's arithmetic does not depend on the number of workers."""


class Batch(NamedTuple):
    """One rank's images of one global batch."""

    place: GlobalBatch
    ids: np.ndarray
    """Sample ids, int64 [b], ascending; b may be 0."""
    images: np.ndarray
    """uint8 [b, C, H, W]; none of them where they lie on the device already."""
    missing: int = 0
    """Images of this rank's part that are damaged and were left out, which data.on_corrupt=skip allows."""
    notes: tuple[str, ...] = ()
    """What a person should be told: what was left out and why, or why nothing is cached any more; one line each."""


@dataclass(frozen=True)
class DataSet:
    """Packed images at an address."""

    bucket: Bucket
    manifest: Manifest
    row_groups: np.ndarray
    """Every row group in order, dtype ROW_GROUP."""
    patience: Patience | None = None
    """With a bucket that is out of reach, beyond the deadline of a request."""
    processes_here: int = 1
    """That read images on this machine at the same time, and share its cores for decoding."""

    @cached_property
    def row_group_rows(self) -> np.ndarray:
        """Rows of every row group, in order; shape [row groups], int64."""
        return self.row_groups["rows"].astype(np.int64)

    @property
    def unpacked_bytes(self) -> int:
        """Of all its images, as uint8."""
        return self.manifest.images * self.manifest.dims

    def plan(self, config: DataConfig, *, seed: int, rank: int = 0, world_size: int = 1) -> RankPlan:
        """Which images make up each of the rank's batches."""
        return RankPlan(
            row_group_rows=self.row_group_rows,
            global_batch=config.global_batch,
            lanes=config.lanes,
            window_rows=config.window_rows,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def training_batches(
        self, config: DataConfig, *, seed: int, images_seen: int, until: int, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """The rank's batches after `images_seen` images of the whole job, until `until`; threads read until it is closed."""
        plan = self.plan(config, seed=seed, rank=rank, world_size=world_size)
        cache = self._cache(config)
        groups = RowGroups(self.bucket, self.manifest, self.row_groups, cache=cache, patience=self.patience)
        held, skip = self._groups_held(config, world_size=world_size), config.on_corrupt == "skip"
        reader = RowGroupReader(groups, groups_held=held, skip_damaged=skip, processes_here=self.processes_here)
        planned = (
            ((place, len(ids)), np.sort(ids)) for place, ids in plan.batches(images_seen=images_seen, until=until)
        )
        with closing(reader.batches(planned, prefetch=config.prefetch_batches)) as read:
            for (place, due), ids, images, skipped in read:
                notes = [f"left out of training: {line}" for line in skipped]
                if cache is not None and cache.trouble:
                    notes.append(cache.trouble)
                yield Batch(place, ids, images, due - len(ids), tuple(notes))

    def reader_bytes(self, config: DataConfig, *, world_size: int = 1) -> int:
        """The most memory that a rank's training batches hold at once: row groups, and batches made ahead of the step.

        Row groups count as they are stored; those of an indexed file are unpacked in memory.
        """
        groups = min(self._groups_held(config, world_size=world_size) + GROUPS_AHEAD, len(self.row_groups))
        rank_batch = math.ceil(config.global_batch / world_size) * self.manifest.dims
        return groups * int(self.row_groups["size"].max()) + (config.prefetch_batches + 4) * rank_batch

    def evaluation_blocks(
        self, *, rank: int = 0, world_size: int = 1
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """The rank's blocks of consecutive (ids, images): over all ranks each image exactly once, unpadded."""
        blocks = math.ceil(self.manifest.images / EVALUATION_BLOCK)
        own = range(blocks * rank // world_size, blocks * (rank + 1) // world_size)
        ids = (np.arange(i * EVALUATION_BLOCK, min((i + 1) * EVALUATION_BLOCK, self.manifest.images)) for i in own)
        with closing(self._reader(groups_held=2).batches(((None, block) for block in ids), prefetch=4)) as read:
            for _, own_ids, images, _ in read:
                yield own_ids, images

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The images with these ids, in their order; uint8 [len(ids), C, H, W]."""
        ascending, places = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        return self.found(ascending, skip_damaged=False)[1][places]

    def found(self, ids: np.ndarray, *, skip_damaged: bool) -> tuple[np.ndarray, np.ndarray]:
        """The images with these ascending ids, after the ids of those that are not damaged and left out.

        Raises DataError if none is left.
        """
        read = next(self._reader(groups_held=2, skip_damaged=skip_damaged).batches([(None, ids)], prefetch=1))
        if len(ids) and not len(read.ids):
            raise DataError(f"{self.bucket.url}: none of {len(ids)} images can be read: {read.skipped[0]}")
        return read.ids, read.images

    def _reader(self, *, groups_held: int, skip_damaged: bool = False) -> RowGroupReader:
        groups = RowGroups(self.bucket, self.manifest, self.row_groups, patience=self.patience)
        return RowGroupReader(
            groups, groups_held=groups_held, skip_damaged=skip_damaged, processes_here=self.processes_here
        )

    def _groups_held(self, config: DataConfig, *, world_size: int) -> int:
        # A lane's offset needs rows up to about window_rows / 2 to either side; a rank shares a lane at either cut.
        groups_per_lane = math.ceil(config.window_rows / float(np.median(self.row_group_rows))) + 3
        return (math.ceil(config.lanes / world_size) + 2) * groups_per_lane

    def _cache(self, config: DataConfig) -> DiskCache | None:
        if config.cache_dir is None:
            return None
        name = hashlib.sha256(f"{self.manifest.fingerprint}{self.manifest.row_groups_sha256}".encode()).hexdigest()[:32]
        return DiskCache(config.cache_dir, limit_bytes=config.cache_bytes, data_set=name)


def open_data(address: str) -> DataSet:
    """The packed images at an address. Raises DataError where there are none, or where their manifest is damaged."""
    bucket = open_bucket(address)
    manifest = read_manifest(bucket)
    return DataSet(bucket, manifest, read_row_groups(bucket, manifest))
