"""Images in a column of a Parquet file, as bytes or as Hugging Face's struct of bytes and path."""

import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from mmap import mmap
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.sources.files import map_file
from vaejob.data.sources.source import Sample
from vaejob.errors import DataError

_USUAL_NAMES = ("image", "img", "images", "jpeg", "jpg", "png", "webp", "picture")


@dataclass(frozen=True)
class ParquetSource:
    """The rows of one Parquet file; a key is the row's number."""

    address: str
    content: mmap
    file: pq.ParquetFile
    column: str
    description: str
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @cached_property
    def samples(self) -> list[Sample]:
        identity = f"{len(self.content)} {zlib.crc32(self.content):08x}"
        return [Sample(f"{row:08d}", identity) for row in range(self.file.metadata.num_rows)]

    def read(self, index: int) -> bytes:
        group = bisect_right(self._starts, index) - 1
        with self._lock:
            images = self._images_of_group(group)
        data = images[index - self._starts[group]].as_py()
        if data is None:
            raise DataError(f"{self.address} row {index}: column {self.column} holds no image bytes")
        return data  # type: ignore[no-any-return]

    @cached_property
    def _starts(self) -> list[int]:
        groups = map(self.file.metadata.row_group, range(self.file.metadata.num_row_groups))
        return list(accumulate((group.num_rows for group in groups), initial=0))[:-1]

    @cached_property
    def _images_of_group(self) -> Any:
        # Two, since threads that read ahead stand on either side of a border.
        return lru_cache(maxsize=2)(self._read_group)

    def _read_group(self, group: int) -> Any:
        try:
            column = self.file.read_row_group(group, columns=[self.column])[self.column.split(".")[0]].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.address} row group {group} cannot be read: {' '.join(str(error).split())}"
            ) from error
        return column.field("bytes") if pa.types.is_struct(column.type) else column


def open_parquet(address: str, *, column: str | None = None) -> ParquetSource:
    """A Parquet file; its column of images is found by its name or type where `column` does not name it."""
    content = map_file(address)
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{address} is no complete Parquet file: {' '.join(str(error).split())}") from error
    chosen = _image_column(address, file.schema_arrow, column=column)
    description = f"parquet {address} (column {chosen}): {file.metadata.num_rows} images"
    path = f"{chosen}.bytes" if pa.types.is_struct(file.schema_arrow.field(chosen).type) else chosen
    return ParquetSource(address, content, file, path, description)


def _image_column(address: str, schema: Any, *, column: str | None) -> str:
    candidates = [field.name for field in schema if _may_hold_images(field.type)]
    if column is None:
        found = [name for name in candidates if name.lower() in _USUAL_NAMES] or candidates
    else:
        found = [name for name in candidates if name == column]
    match found:
        case [name]:
            return str(name)
        case []:
            columns = ", ".join(f"{field.name} {field.type}" for field in schema)
            wanted = "" if column is None else f" named {column}"
            raise DataError(f"{address} has no column of image bytes{wanted}; its columns are: {columns}")
        case _:
            raise DataError(f"{address} has several columns of bytes: {', '.join(found)}; name one with --column")


def _may_hold_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names and _may_hold_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
