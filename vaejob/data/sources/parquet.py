"""Images in a column of a Parquet file, as bytes or as Hugging Face's struct of bytes and path."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.sources.content import Content, ContentFile, open_content
from vaejob.data.sources.probe import footer_size, parsed, safe_metadata
from vaejob.data.sources.recent import Recent
from vaejob.data.sources.source import Reopened, Sample
from vaejob.errors import DataError

_USUAL_NAMES = ("image", "img", "images", "jpeg", "jpg", "png", "webp", "picture")
_TAIL_BYTES = 64 << 10  # holds most footers

_footers: Recent[tuple[str, str], pq.FileMetaData] = Recent(most=64)
# Threads that read ahead stand on either side of a border, and two shards may be packed at once.
_row_groups: Recent[tuple[str, str, str, int], Any] = Recent(most=4)


@dataclass(frozen=True)
class ParquetSource(Reopened):
    """The rows of one Parquet file; a key is the row's number."""

    content: Content
    column: str
    group_rows: list[int]
    """Rows of each row group."""
    footer_sha256: str
    """Of the footer that was parsed safely, which another process may parse at once."""
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(f"{row:08d}", self.content.version) for row in range(sum(self.group_rows))]

    def read(self, index: int) -> bytes:
        group = bisect_right(self._starts, index) - 1
        key = self.content.address, self.content.version, self.column, group
        images = _row_groups.get(key, lambda: self._read_row_group(group))
        data = images[index - self._starts[group]].as_py()
        if data is None:
            raise DataError(f"{self.content.address} row {index}: column {self.column} holds no image bytes")
        return data  # type: ignore[no-any-return]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self.group_rows, initial=0))[:-1]

    def _read_row_group(self, group: int) -> Any:
        address = self.content.address
        metadata = _footers.get((address, self.content.version), self._read_metadata)
        try:
            file = pq.ParquetFile(pa.PythonFile(ContentFile(self.content), mode="r"), metadata=metadata)
            table = file.read_row_group(group, columns=[self.column], use_threads=False)
            column = table[self.column.split(".")[0]].combine_chunks()
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise DataError(f"{address} row group {group} cannot be read: {' '.join(str(error).split())}") from error
        if len(column) != self.group_rows[group]:
            rows = f"{len(column)} rows, its footer says {self.group_rows[group]}"
            raise DataError(f"{address} row group {group} is damaged: it has {rows}")
        return column.field("bytes") if pa.types.is_struct(column.type) else column

    def _read_metadata(self) -> pq.FileMetaData:
        footer = read_footer(self.content)
        if hashlib.sha256(footer).hexdigest() != self.footer_sha256:
            raise DataError(f"{self.content.address} was changed since it was listed: its footer is another")
        return parsed(footer)


def open_parquet(address: str, *, column: str | None = None, version: str | None = None) -> ParquetSource:
    """A Parquet file; its column of images is found by its name or type where `column` does not name it."""
    content = open_content(address, version)
    footer = read_footer(content)
    metadata = safe_metadata(address, footer)
    schema = metadata.schema.to_arrow_schema()
    chosen = _image_column(address, schema, column=column)
    path = f"{chosen}.bytes" if pa.types.is_struct(schema.field(chosen).type) else chosen
    group_rows = rows_of_groups(content, metadata)
    description = f"parquet {address} (column {chosen}): {metadata.num_rows} images"
    return ParquetSource(content, path, group_rows, hashlib.sha256(footer).hexdigest(), description)


def rows_of_groups(content: Content, metadata: pq.FileMetaData) -> list[int]:
    """Rows of each row group. Raises DataError for a footer that claims more than the file can hold."""
    group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(group_rows, default=0) < 0 or not sum(group_rows) == metadata.num_rows <= content.size:
        rows = f"its footer says that {metadata.num_rows} rows are in {content.size} bytes"
        raise DataError(f"{content.address} is no complete Parquet file: {rows}")
    return group_rows


def read_footer(content: Content) -> bytes:
    """A file's last bytes, from its footer on. Raises DataError if they are those of no Parquet file."""
    tail = content.read_once(max(0, content.size - _TAIL_BYTES), content.size)
    size = footer_size(content.address, tail, file_size=content.size)
    return tail[-size:] if size <= len(tail) else content.read_once(content.size - size, content.size)


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
