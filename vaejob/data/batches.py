"""A data set's images as uint8 batches: in training order for one rank, or each once for evaluation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vaejob.config import DataConfig
from vaejob.data.manifest import Manifest, read_manifest
from vaejob.data.order import GlobalBatch, RankPlan
from vaejob.data.reader import RowGroupReader
from vaejob.storage import Bucket, open_bucket

EVALUATION_BLOCK = 256
"""Images evaluated together. Fixed, so that an image's arithmetic does not depend on the number of workers."""


class Batch(NamedTuple):
    """One rank's images of one global batch."""

    place: GlobalBatch
    ids: np.ndarray
    """Sample ids, int64 [b]; b may be 0."""
    images: np.ndarray
    """uint8 [b, C, H, W]."""


@dataclass(frozen=True)
class DataSet:
    """Packed images at an address."""

    bucket: Bucket
    manifest: Manifest

    def training_batches(
        self, config: DataConfig, *, seed: int, images_seen: int, until: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """The rank's batches after `images_seen` images of the whole job, until `until`."""
        group_rows = self.manifest.row_group_rows()
        plan = RankPlan(
            row_group_rows=group_rows,
            global_batch=config.global_batch,
            lanes=config.lanes,
            window_rows=config.window_rows,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        # A lane's offset needs rows up to about window_rows / 2 to either side; a rank shares a lane at either cut.
        groups_per_lane = math.ceil(config.window_rows / float(np.median(group_rows))) + 3
        lanes_of_rank = math.ceil(config.lanes / world_size) + 2
        reader = RowGroupReader(self.bucket, self.manifest, groups_held=lanes_of_rank * groups_per_lane)
        batches = (((place, ids), ids) for place, ids in plan.batches(images_seen=images_seen, until=until))
        for (place, ids), images in reader.batches(batches, prefetch=config.prefetch_batches):
            yield Batch(place, ids, images)

    def evaluation_blocks(self, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rank's blocks of consecutive (ids, images): over all ranks each image exactly once, unpadded."""
        blocks = math.ceil(self.manifest.images / EVALUATION_BLOCK)
        own = range(blocks * rank // world_size, blocks * (rank + 1) // world_size)
        ids = (np.arange(i * EVALUATION_BLOCK, min((i + 1) * EVALUATION_BLOCK, self.manifest.images)) for i in own)
        reader = RowGroupReader(self.bucket, self.manifest, groups_held=16)
        yield from reader.batches(((block, block) for block in ids), prefetch=4)

    def images(self, ids: np.ndarray) -> np.ndarray:
        """The images with these ids; uint8 [len(ids), C, H, W]."""
        reader = RowGroupReader(self.bucket, self.manifest, groups_held=16)
        return next(reader.batches([(None, np.asarray(ids, dtype=np.int64))], prefetch=0))[1]


def open_data(address: str) -> DataSet:
    """The packed images at an address. Raises DataError where there are none, or where their manifest is damaged."""
    bucket = open_bucket(address)
    return DataSet(bucket, read_manifest(bucket))
