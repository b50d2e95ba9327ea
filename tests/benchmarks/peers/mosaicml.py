"""MosaicML Streaming: shards of its MDS format, downloaded to a local folder and read from there."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import boto3.s3.transfer  # noqa: F401 - imported at the first download
import botocore.config  # noqa: F401
import torch
from torch.utils.data import DataLoader

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.pictures import Case, Pictures, to_batch

if torch.version.cuda is None:
    # PyPI's torchvision is built for CUDA; beside a CPU build of torch it stops at the import for want of these.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset


@dataclass(frozen=True)
class MosaicML:
    """Its default shard size, shuffle and read-ahead; images are its plain bytes, decoded by us."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit=pictures.case.shard_bytes) as writer:
            for stored in pictures:
                writer.write({"image": stored})

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        dataset = StreamingDataset(
            remote=reading.address, local=reading.cache, shuffle=True, shuffle_seed=SEED, batch_size=BATCH
        )
        if reading.images_seen:
            dataset.load_state_dict({**dataset.state_dict(reading.images_seen, from_beginning=True), "epoch": 0})
        yield from DataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=reading.workers,
            collate_fn=partial(stack, reading.case),
        )


def stack(case: Case, samples: list[dict[str, bytes]]) -> torch.Tensor:
    return to_batch(case, [sample["image"] for sample in samples])
