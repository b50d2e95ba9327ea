"""Parquet files of encoded images, for those peers that read any Parquet."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.peers.pictures import Pictures

ROW_GROUP_BYTES = 3 << 20
"""About what Hugging Face's `push_to_hub` makes of a hundred photographs."""


def write_parquet(pictures: Pictures, folder: Path) -> None:
    """Files of at most shard_bytes, of row groups of ROW_GROUP_BYTES."""
    folder.mkdir(parents=True)
    row_bytes = sum(map(len, pictures)) / len(pictures)
    rows = max(1, int(ROW_GROUP_BYTES / row_bytes))
    rows_of_file = max(1, int(pictures.case.shard_bytes / row_bytes))
    for first in range(0, len(pictures), rows_of_file):
        last = min(first + rows_of_file, len(pictures))
        table = pa.table({"image": pa.array([pictures[i] for i in range(first, last)], pa.binary())})
        pq.write_table(table, folder / f"{first:08d}.parquet", row_group_size=rows, compression="none")
