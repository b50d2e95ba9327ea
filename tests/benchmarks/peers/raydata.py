"""Ray Data: Parquet files, read and decoded by its tasks, taken as torch batches."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.fs
import ray
import ray.data
import torch

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.parquet import write_parquet
from tests.benchmarks.peers.pictures import Case, Pictures, to_batch


@dataclass(frozen=True)
class RayData:
    """Its own tasks and object store; starting Ray is not timed, since a job on Ray has it running."""

    def __post_init__(self) -> None:
        ray.init(address="local", include_dashboard=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False

    def write(self, pictures: Pictures, folder: Path) -> None:
        write_parquet(pictures, folder)

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(reading.address)
        dataset = ray.data.read_parquet(path, filesystem=filesystem, shuffle="files")
        decoded = dataset.map_batches(partial(decode, reading.case), batch_size=BATCH)
        for batch in decoded.iter_torch_batches(
            batch_size=BATCH, local_shuffle_buffer_size=4 * BATCH, local_shuffle_seed=SEED
        ):
            yield batch["image"]


def decode(case: Case, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": to_batch(case, rows["image"].tolist()).numpy()}
