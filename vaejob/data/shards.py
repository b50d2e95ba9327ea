"""One shard: a plain Parquet file of ids, keys and images, and how to read one row group's images without the rest.

Nothing is compressed and nothing is null, so the images of a row group are one stretch of the file that needs no Parquet
reader: raw pixels end to end, or image files that each follow their length.
"""

import hashlib
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaejob.data.manifest import ROW_GROUP, Shard
from vaejob.errors import DataDamaged, DataError

Images = np.ndarray | list[memoryview]
"""Of one row group. Raw: uint8 [rows, C*H*W]; encoded: one image file each."""

_ONE_PAGE = 1 << 30
_SEAL_NAME = "vaejob.seal"
_SEAL = b"vaejob-seal:"
_OPEN = b"0" * 64
_LENGTH = struct.Struct("<I")


class Row(NamedTuple):
    """One sample of a shard."""

    id: int
    key: str
    image: bytes


def encode_shard(row_groups: list[list[Row]], *, image_bytes: int | None) -> bytes:
    """A Parquet file of these row groups, which holds a hash of itself.

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
        writer.add_key_value_metadata({_SEAL_NAME: (_SEAL + _OPEN).decode()})
    return _sealed(file.getvalue().to_pybytes())


def is_whole(data: bytes) -> bool:
    """Whether these bytes are a shard that `encode_shard` made, and nothing has damaged it since."""
    place = data.rfind(_SEAL) + len(_SEAL)
    return place >= len(_SEAL) and _sealed(data[:place] + _OPEN + data[place + len(_OPEN) :]) == data


def is_ours(data: bytes) -> bool:
    """Whether these bytes, or the last of them, come from `encode_shard`, damaged in one place or not."""
    return _SEAL in data or _SEAL_NAME.encode() in data


def _sealed(data: bytes) -> bytes:
    """The bytes with their hash in the place that was left open for it."""
    place = data.rindex(_SEAL + _OPEN) + len(_SEAL)
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + len(_OPEN) :]


def describe_shard(key: str, data: bytes, *, image_bytes: int | None) -> tuple[Shard, np.ndarray]:
    """A shard's sizes and checksums, and its row groups [row groups] of dtype ROW_GROUP, from its own bytes.

    Only for bytes that `is_whole`: Parquet's parser may end the process over damaged ones.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    table = np.zeros(file.num_row_groups, dtype=ROW_GROUP)
    for index in range(len(table)):
        group = file.metadata.row_group(index)
        column = group.column(group.num_columns - 1)
        # The chunk is one page: a header, then the values, each after its length where lengths differ.
        lengths = pc.binary_length(file.read_row_group(index, columns=["image"], use_threads=False)["image"])
        size = pc.sum(lengths).as_py() + (0 if image_bytes is not None else _LENGTH.size * group.num_rows)
        offset = column.data_page_offset + column.total_compressed_size - size
        table[index] = group.num_rows, size, offset, zlib.crc32(memoryview(data)[offset : offset + size])
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    shard = Shard(
        key=key,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer_size=len(footer),
        footer_crc32=zlib.crc32(footer),
        rows=file.metadata.num_rows,
        row_groups=len(table),
    )
    return shard, table


def check_bytes(name: str, data: bytes, *, size: int, crc32: int) -> None:
    """Raises DataDamaged, with that name, for bytes that are not what the manifest says."""
    if len(data) != size:
        raise DataDamaged(f"{name}: it has {len(data)} bytes, the manifest says {size}")
    if (found := zlib.crc32(data)) != crc32:
        raise DataDamaged(f"{name}: checksum is {found:08x}, the manifest says {crc32:08x}")


def plain_images(name: str, body: bytes, *, rows: int, image_bytes: int | None) -> Images:
    """The images of a row group of layout plain, without a copy. Raises DataError if the bytes are not `rows` images."""
    if image_bytes is not None:
        if len(body) != rows * image_bytes:
            raise DataError(f"{name}: it has {len(body)} bytes, {rows} images have {rows * image_bytes}")
        return np.frombuffer(body, dtype=np.uint8).reshape(rows, image_bytes)
    view, images, place = memoryview(body), list[memoryview](), 0
    while place + _LENGTH.size <= len(view):
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack_from(view, place)[0]
        images.append(view[start:place])
    if place != len(view) or len(images) != rows:
        raise DataError(f"{name}: its bytes are not {rows} images, each after its length")
    return images
