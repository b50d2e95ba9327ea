"""Hugging Face datasets: Parquet files, streamed."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import s3fs  # noqa: F401 - imported at the first s3:// address
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from tests.benchmarks.peers.loader import BATCH, SEED, Reading
from tests.benchmarks.peers.parquet import write_parquet
from tests.benchmarks.peers.pictures import Case, Pictures, to_batch


@dataclass(frozen=True)
class HuggingFace:
    """Its default shuffle buffer of a thousand images."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        write_parquet(pictures, folder)

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        files = [f"{reading.address}/{name}" for name in reading.files]
        dataset = load_dataset("parquet", data_files=files, split="train", streaming=True).shuffle(seed=SEED)
        if reading.images_seen:
            dataset.load_state_dict(json.loads(Path(reading.state).read_text()))
        try:
            yield from DataLoader(
                dataset, batch_size=BATCH, num_workers=reading.workers, collate_fn=partial(stack, reading.case)
            )
        finally:
            if reading.saves_state:
                Path(reading.state).write_text(json.dumps(dataset.state_dict()))


def stack(case: Case, samples: list[dict[str, bytes]]) -> torch.Tensor:
    return to_batch(case, [sample["image"] for sample in samples])
