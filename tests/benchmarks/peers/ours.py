"""vaejob's own reader."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import vaejob
import vaejob.storage.remote  # open_data imports it at its first s3:// address
from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.pictures import Pictures
from vaejob.config import DataConfig
from vaejob.data.pack import pack
from vaejob.data.sources import Sample


@dataclass(frozen=True)
class PictureSource:
    """Pictures as something to pack."""

    pictures: Pictures

    @property
    def description(self) -> str:
        return f"{len(self.pictures)} images of a benchmark"

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(f"{i:08d}", str(pixels)) for i, pixels in enumerate(self.pictures.hashes)]

    def read(self, index: int) -> bytes | np.ndarray:
        stored = self.pictures[index]
        if self.pictures.case.kind != "raw":
            return stored
        return np.frombuffer(stored, dtype=np.uint8).reshape(self.pictures.case.shape)


@dataclass(frozen=True)
class Ours:
    """Shards as `vaejob data pack` writes them; with workers, as many ranks, each in a process of its own."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        encoding = "raw" if pictures.case.kind == "raw" else "keep"
        pack(PictureSource(pictures), str(folder), encoding=encoding, shard_bytes=pictures.case.shard_bytes)

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        address = f"{reading.address}/train"
        config = DataConfig(train=address, global_batch=BATCH * reading.world_size)
        batches = vaejob.open_data(address).training_batches(
            config,
            seed=SEED,
            images_seen=reading.images_seen,
            until=reading.case.images,
            rank=reading.rank,
            world_size=reading.world_size,
        )
        for batch in batches:
            yield torch.from_numpy(batch.images)
