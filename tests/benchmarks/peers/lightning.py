"""LitData: chunks of its own format, downloaded to a local folder and read from there."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import boto3.s3.transfer  # noqa: F401 - imported at the first download
import obstore.store  # noqa: F401
import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming import downloader

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.pictures import Pictures, to_batch


@dataclass(frozen=True)
class LitData:
    """Its default shuffle and read-ahead; images are its plain bytes, decoded by us."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        optimize(
            fn=pictures.__getitem__,
            inputs=list(range(len(pictures))),
            output_dir=str(folder),
            chunk_bytes=pictures.case.shard_bytes,
            num_workers=1,
            verbose=False,
        )

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        dataset = StreamingDataset(
            reading.address,
            cache_dir=reading.cache,
            shuffle=True,
            seed=SEED,
            force_override_state_dict=True,  # else it refuses to resume with its cache in another folder
        )
        loader = StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=reading.workers,
            collate_fn=partial(to_batch, reading.case),
        )
        if reading.images_seen:
            loader.load_state_dict(json.loads(Path(reading.state).read_text()))
        try:
            yield from loader
        finally:
            if reading.saves_state:
                Path(reading.state).write_text(json.dumps(loader.state_dict()))


# There is no setting for a plain http:// endpoint.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
