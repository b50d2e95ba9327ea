"""The floor: torch's DataLoader over small files, each fetched whole when the one before it is used up."""

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.objects import open_store
from tests.benchmarks.peers.pictures import Pictures, to_batch

FILE_BYTES = 8 << 20


@dataclass(frozen=True)
class Files(IterableDataset[memoryview]):
    """The images of a worker's share of the files; shuffled within a file, and the files among each other."""

    address: str
    names: list[str]

    def __iter__(self) -> Iterator[memoryview]:
        worker = get_worker_info()
        store = open_store(self.address)
        rng = random.Random(SEED)
        names = rng.sample(self.names, len(self.names))
        for name in names[worker.id :: worker.num_workers] if worker else names:
            images = parse_file(store.get(name).bytes())
            rng.shuffle(images)
            yield from images


@dataclass(frozen=True)
class Plain:
    """No reading ahead, no check of what was read, no resuming."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        folder.mkdir(parents=True)
        held: list[bytes] = []
        for i, stored in enumerate(pictures, start=1):
            held.append(stored)
            if i == len(pictures) or sum(map(len, held)) >= min(FILE_BYTES, pictures.case.shard_bytes):
                (folder / f"{i:08d}").write_bytes(file_of(held))
                held.clear()

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        yield from DataLoader(
            Files(reading.address, reading.files),
            batch_size=BATCH,
            num_workers=reading.workers,
            collate_fn=partial(to_batch, reading.case),
        )


def file_of(images: list[bytes]) -> bytes:
    """Their number, where each ends, then the images."""
    return b"".join([np.array([len(images), *np.cumsum([len(i) for i in images])], "<i8").tobytes(), *images])


def parse_file(body: bytes) -> list[memoryview]:
    view = memoryview(body)
    count = int.from_bytes(view[:8], "little")
    ends = np.frombuffer(view, "<i8", count, offset=8).tolist()
    images = view[8 * (count + 1) :]
    return [images[start:end] for start, end in pairwise([0, *ends])]
