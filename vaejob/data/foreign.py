"""Row groups of Parquet files that some other program wrote, read by Parquet's own reader from one stretch of the file.

chunk of the column --pages' headers checked against the footer--> Parquet's reader --> one view for each image
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vaejob.data.pages import check_pages
from vaejob.data.shards import Images
from vaejob.errors import DataError

_UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError, RuntimeError)


@dataclass(frozen=True)
class Footer:
    """A parsed footer, and which of its columns holds the images."""

    metadata: Any
    column: str
    number: int
    """The column's, among the leaves of the schema."""
    row_groups: tuple[int, ...]
    """Parquet's numbers of those that have rows: ours leave the empty ones out."""

    def chunk(self, index: int) -> Any:
        """What the footer says of the column in row group `index`."""
        return self.metadata.row_group(self.row_groups[index]).column(self.number)


def parse_footer(name: str, footer: bytes, *, column: str) -> Footer:
    """Only for bytes whose checksum is right: Parquet's parser may end the process over damaged ones. Raises DataError."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    return footer_of(name, metadata, column=column)


def footer_of(name: str, metadata: pq.FileMetaData, *, column: str) -> Footer:
    """Raises DataError if the file has no such column."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    if column not in paths:
        raise DataError(f"{name} has no column {column}; its columns are: {', '.join(paths)}")
    with_rows = (group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows)
    return Footer(metadata, column, paths.index(column), tuple(with_rows))


def parquet_images(
    name: str, body: bytes, *, footer: Footer, index: int, rows: int, offset: int, file_size: int, first_row: int = 0
) -> Images:
    """The images of one row group, from the bytes of their column chunk at `offset` of the file.

    index counts the row groups that have rows. Raises DataError; rows are counted from first_row in what it says.
    """
    try:
        chunk = footer.chunk(index)
        check_pages(body, values=chunk.num_values, unpacked_bytes=chunk.total_uncompressed_size)
        window = _Window(pa.py_buffer(body), start=offset, file_size=file_size)
        file = pq.ParquetFile(pa.PythonFile(window, mode="r"), metadata=footer.metadata)
        group = footer.row_groups[index]
        arrays = file.read_row_group(group, columns=[footer.column], use_threads=False).column(0).chunks
        while arrays and pa.types.is_struct(arrays[0].type):
            arrays = [array.flatten()[0] for array in arrays]
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    if (found := sum(map(len, arrays))) != rows:
        raise DataError(f"{name}: it has {found} rows, {rows} were expected")
    if any(array.null_count for array in arrays):
        without = pc.index(pc.is_null(pa.chunked_array(arrays)), True).as_py()
        raise DataError(f"{name}: row {first_row + without} holds no image")
    if pa.types.is_fixed_size_binary(arrays[0].type):
        pieces = [_equally_long(array) for array in arrays]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return [image for array in arrays for image in _views(array)]


def _equally_long(array: Any) -> np.ndarray:
    """uint8 [rows, bytes of an image], without a copy."""
    width = array.type.byte_width
    values = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _views(array: Any) -> list[memoryview]:
    """The byte strings of an array, without a copy."""
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        array = array.cast(pa.large_binary())
    _, offsets, data = array.buffers()
    width = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    bounds = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data or b"").cast("B")  # Arrow calls its bytes signed, and then none equals 0xff
    return [view[start:stop] for start, stop in pairwise(bounds)]


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}")


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
