"""One shard: a plain Parquet file of ids, keys and images, and how to read one row group of it without the rest.

Nothing is compressed and nothing is null, so a row group is one stretch of the file and its raw pixels need no decoding.
"""

import hashlib
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.manifest import RowGroup, Shard
from vaejob.errors import DataError
from vaejob.storage import Bucket

_ONE_PAGE = 1 << 30
_SEAL = b"vaejob-seal:"
_OPEN = b"0" * 64


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


def encode_shard(row_groups: list[list[Row]], *, image_bytes: int | None, plan: str) -> bytes:
    """A Parquet file of these row groups, which holds a hash of itself and of what it was packed from, its plan.

    image_bytes is the length of every image, or None where they differ.
    """
    image_type = pa.binary() if image_bytes is None else pa.binary(image_bytes)
    fields = (("id", pa.int64()), ("key", pa.string()), ("image", image_type))
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])
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
        writer.add_key_value_metadata({"vaejob.plan": plan, "vaejob.seal": (_SEAL + _OPEN).decode()})
    return _sealed(file.getvalue().to_pybytes())


def shard_plan(data: bytes) -> str | None:
    """The plan of a shard that `encode_shard` made and nothing has damaged since; None for any other bytes."""
    place = data.rfind(_SEAL) + len(_SEAL)
    if place < len(_SEAL) or _sealed(data[:place] + _OPEN + data[place + len(_OPEN) :]) != data:
        return None
    return str(pq.read_metadata(pa.BufferReader(data)).metadata[b"vaejob.plan"].decode())


def is_ours(data: bytes) -> bool:
    """Whether these bytes come from `encode_shard`, damaged or not."""
    return b"vaejob.plan" in data or _SEAL in data


def _sealed(data: bytes) -> bytes:
    """The bytes with their hash in the place that was left open for it."""
    place = data.rindex(_SEAL + _OPEN) + len(_SEAL)
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + len(_OPEN) :]


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
    footer = data[groups[-1].offset + groups[-1].size :]
    return Shard(
        key=key,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer_size=len(footer),
        footer_crc32=zlib.crc32(footer),
        row_groups=tuple(groups),
    )


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
    _check(name, body, size=group.size, crc32=group.crc32)
    _check(f"{name}, footer of the shard", footer, size=shard.footer_size, crc32=shard.footer_crc32)
    try:
        window = _Window(pa.py_buffer(body), start=group.offset, file_size=shard.size)
        parquet = pq.ParquetFile(pa.PythonFile(window, mode="r"), metadata=_parse_footer(footer))
        table = parquet.read_row_group(index, columns=["id", "image"], use_threads=False)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise DataError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
    if len(table) != group.rows:
        raise DataError(f"{name}: it has {len(table)} rows, the manifest says {group.rows}")
    return RowGroupColumns(ids=table["id"].to_numpy(), images=_images(table["image"]))


def _check(name: str, data: bytes, *, size: int, crc32: int) -> None:
    if len(data) != size:
        raise DataError(f"{name}: it has {len(data)} bytes, the manifest says {size}")
    if (found := zlib.crc32(data)) != crc32:
        raise DataError(f"{name}: checksum is {found:08x}, the manifest says {crc32:08x}")


def _images(column: Any) -> np.ndarray | list[bytes]:
    if not pa.types.is_fixed_size_binary(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = whole.type.byte_width
    pixels = np.frombuffer(whole.buffers()[1], dtype=np.uint8)
    return pixels[whole.offset * width : (whole.offset + len(whole)) * width].reshape(len(whole), width)


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
