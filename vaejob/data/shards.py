"""One shard: a plain Parquet file of ids, keys and images, and how to read one row group of it without the rest.

Nothing is compressed and nothing is null, so a row group is one stretch of the file and its raw pixels need no decoding.
"""

import hashlib
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.manifest import RowGroup, Shard
from vaejob.errors import DataError
from vaejob.storage import Bucket

_ONE_PAGE = 1 << 30


class Row(NamedTuple):
    """One sample of a shard."""

    id: int
    key: str
    image: bytes


class RowGroupColumns(NamedTuple):
    """The rows of one row group."""

    ids: np.ndarray
    """int64 [rows]."""
    images: np.ndarray | list[bytes]
    """Raw: uint8 [rows, C*H*W]; encoded: one image file each."""


def encode_shard(row_groups: list[list[Row]], *, image_bytes: int | None, metadata: Mapping[str, str]) -> bytes:
    """A Parquet file of these row groups; image_bytes is the length of every image, or None where they differ."""
    image_type = pa.binary() if image_bytes is None else pa.binary(image_bytes)
    fields = (("id", pa.int64()), ("key", pa.string()), ("image", image_type))
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=dict(metadata))
    file = pa.BufferOutputStream()
    with pq.ParquetWriter(
        file,
        schema,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=_ONE_PAGE,
        write_batch_size=_ONE_PAGE,
    ) as writer:
        for rows in row_groups:
            columns = [
                pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(rows))
    return file.getvalue().to_pybytes()  # type: ignore[no-any-return]


def describe_shard(key: str, data: bytes) -> Shard:
    """A shard's sizes and checksums, from its bytes. Raises DataError if they are no Parquet file."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{key} is no Parquet file: {' '.join(str(error).split())}") from error
    groups = []
    for index in range(metadata.num_row_groups):
        start, stop = _row_group_span(metadata, index)
        crc32 = zlib.crc32(data[start:stop])
        groups.append(RowGroup(rows=metadata.row_group(index).num_rows, offset=start, size=stop - start, crc32=crc32))
    if not groups:
        raise DataError(f"{key} holds no rows")
    last = groups[-1]
    return Shard(
        key=key,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer_size=len(data) - last.offset - last.size,
        row_groups=tuple(groups),
    )


def shard_metadata(data: bytes) -> dict[str, str]:
    """What `encode_shard` was given as metadata, and what Parquet adds to it."""
    found = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}


def read_footer(bucket: Bucket, shard: Shard) -> bytes:
    return bucket.read(shard.key, shard.size - shard.footer_size, shard.size)


def read_row_group(bucket: Bucket, shard: Shard, index: int, footer: bytes) -> RowGroupColumns:
    """One row group, by one ranged read. Raises DataError if it is not what the manifest says."""
    group = shard.row_groups[index]
    body = bucket.read(shard.key, group.offset, group.offset + group.size)
    return parse_row_group(shard, index, body=body, footer=footer)


def parse_row_group(shard: Shard, index: int, body: bytes, footer: bytes) -> RowGroupColumns:
    """The rows of one row group, from its bytes and those of the footer.

    Raises DataError, naming shard and row group, if they are not what the manifest says.
    """
    name, group = f"{shard.key} row group {index}", shard.row_groups[index]
    if len(body) != group.size:
        raise DataError(f"{name}: it has {len(body)} bytes, the manifest says {group.size}")
    if (found := zlib.crc32(body)) != group.crc32:
        raise DataError(f"{name}: checksum is {found:08x}, the manifest says {group.crc32:08x}")
    try:
        metadata = _parse_footer(footer)
        # Without this a damaged footer could point at other bytes of the body.
        if _row_group_span(metadata, index) != (group.offset, group.offset + group.size):
            raise DataError(f"{name}: the shard's footer does not match the manifest")
        file = pa.PythonFile(_Window(pa.py_buffer(body), start=group.offset, file_size=shard.size), mode="r")
        parquet = pq.ParquetFile(file, metadata=metadata)
        table = parquet.read_row_group(index, columns=["id", "image"], use_threads=False)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise DataError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
    if len(table) != group.rows:
        raise DataError(f"{name}: it has {len(table)} rows, the manifest says {group.rows}")
    return RowGroupColumns(ids=table["id"].to_numpy(), images=_images(table["image"].combine_chunks()))


def _images(column: Any) -> np.ndarray | list[bytes]:
    if not pa.types.is_fixed_size_binary(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    width = column.type.byte_width
    pixels = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return pixels[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)


def _row_group_span(metadata: Any, index: int) -> tuple[int, int]:
    """First byte, and the one after the last, of a row group's column chunks."""
    group = metadata.row_group(index)
    spans = []
    for column in map(group.column, range(group.num_columns)):
        # An encoder that uses dictionaries puts their page first.
        start = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset is not None)
        spans.append((start, start + column.total_compressed_size))
    return min(start for start, _ in spans), max(stop for _, stop in spans)


@lru_cache(maxsize=64)
def _parse_footer(footer: bytes) -> Any:
    return pq.read_metadata(pa.BufferReader(footer))


class _Window:
    """A file of which only one stretch is there, as pyarrow wants to see it; slices are handed out without a copy."""

    closed = False

    def __init__(self, body: Any, *, start: int, file_size: int) -> None:
        self._body = body
        self._start = start
        self._file_size = file_size
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._file_size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read_buffer(self, size: int) -> Any:
        first = self._position - self._start
        if not 0 <= first <= first + size <= self._body.size:
            raise OSError(f"bytes {self._position} to {self._position + size} are outside the row group")
        self._position += size
        return self._body.slice(first, size)

    def read(self, size: int) -> bytes:
        return self.read_buffer(size).to_pybytes()  # type: ignore[no-any-return]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        pass
