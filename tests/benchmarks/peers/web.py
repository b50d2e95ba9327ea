"""WebDataset: tar files, read from end to end."""

import io
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import webdataset
from webdataset.gopen import gopen_schemes

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.objects import open_store
from tests.benchmarks.peers.pictures import Case, Pictures, to_batch

SHUFFLE_IMAGES = 1000
"""The buffer that its documentation uses."""


@dataclass(frozen=True)
class WebDataset:
    """Tar files shuffled, then a buffer of images; fetched by obstore in place of a new `aws s3 cp` for each file."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        folder.mkdir(parents=True)
        pattern, most = f"{folder}/%06d.tar", pictures.case.shard_bytes
        with webdataset.ShardWriter(pattern, maxcount=10**9, maxsize=most, verbose=0) as writer:
            for i, stored in enumerate(pictures):
                writer.write({"__key__": f"{i:08d}", "image": stored})

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        names = [f"{reading.address}/{name}" for name in reading.files]
        dataset = (
            webdataset.WebDataset(names, shardshuffle=len(names), seed=SEED)
            .shuffle(SHUFFLE_IMAGES, seed=SEED)
            .to_tuple("image")
            .batched(BATCH, collation_fn=partial(stack, reading.case))
        )
        yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=reading.workers)


def stack(case: Case, samples: list[tuple[bytes]]) -> torch.Tensor:
    return to_batch(case, [image for (image,) in samples])


def open_object(url: str, mode: str = "rb", bufsize: int = 0) -> io.BytesIO:
    folder, _, name = url.rpartition("/")
    return io.BytesIO(open_store(folder).get(name).bytes())


gopen_schemes["s3"] = open_object
