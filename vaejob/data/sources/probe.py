"""Footers of Parquet files are parsed by a child process first: a damaged one can end the process that parses it.

footer --to the child's stdin--> one line back: empty if it was parsed, else what is wrong with it
"""

import atexit
import os
import resource
import select
import subprocess
import sys
from contextlib import suppress
from threading import Lock
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.errors import DataError, OutsideError

MAGIC = b"PAR1"

_MEMORY_BYTES = 4 << 30
_REPLY_S = 60.0
_READY = b"ready\n"


def footer_size(address: str, tail: bytes, *, file_size: int) -> int:
    """Bytes of a Parquet file's footer, its length and closing magic included, from the last bytes of the file.

    Raises DataError if they are those of no Parquet file.
    """
    if len(tail) < 8 or tail[-4:] != MAGIC:
        raise DataError(f"{address} is no complete Parquet file: it does not end with {MAGIC.decode()}")
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if size > file_size:
        raise DataError(f"{address} is no complete Parquet file: it has {file_size} bytes, its footer {size}")
    return size


def safe_metadata(address: str, footer: bytes) -> pq.FileMetaData:
    """The metadata in a footer that no checksum vouches for. Raises DataError where it cannot be parsed.

    The footer is the end of a file: all of its footer, and perhaps some of what comes before.
    """
    footer = footer[len(footer) - footer_size(address, footer, file_size=len(footer)) :]
    if complaint := _child.complaint_about(footer):
        raise DataError(f"{address} is no complete Parquet file: {complaint}")
    return parsed(footer)


def parsed(footer: bytes) -> pq.FileMetaData:
    """The metadata in a footer, of which every part that we use has been touched; only a damaged one raises."""
    metadata = pq.read_metadata(pa.BufferReader(footer))
    metadata.schema.to_arrow_schema()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        # The parser ends the process over a column that is not there.
        if group.num_columns != metadata.num_columns:
            raise ValueError(f"a row group has {group.num_columns} columns, the schema {metadata.num_columns}")
        for column in map(group.column, range(group.num_columns)):
            _ = column.path_in_schema, column.dictionary_page_offset, column.data_page_offset
            _ = column.total_compressed_size, column.total_uncompressed_size, column.num_values
    return metadata


def serve() -> None:
    """What the child does until its parent is gone."""
    with suppress(ValueError, OSError):  # where a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    stdout.write(_READY)
    stdout.flush()
    while len(length := stdin.read(8)) == 8:
        stdout.write(_complaint(stdin.read(int.from_bytes(length, "little"))).encode() + b"\n")
        stdout.flush()


def _complaint(footer: bytes) -> str:
    try:
        parsed(footer)
    except (pa.ArrowException, OSError, ValueError, MemoryError, RuntimeError, OverflowError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return ""


class _Child:
    """Started by the first footer, and again after one that ended it; shared by the threads of this process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def complaint_about(self, footer: bytes) -> str:
        """Why the footer cannot be parsed; empty if it can."""
        with self._lock:
            stdin, stdout = self._pipes()
            try:
                stdin.write(len(footer).to_bytes(8, "little") + footer)
                stdin.flush()
                reply = _line(stdout)
            except BrokenPipeError:
                reply = b""
            if not reply.endswith(b"\n"):
                self._end()
                return "its footer is damaged"
            return reply.decode().strip()

    def close(self) -> None:
        with self._lock:
            self._end()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None or self._parent != os.getpid():  # after a fork it is another's
            self._process, self._parent = _started(), os.getpid()
            assert self._process.stdout
            if _line(self._process.stdout) != _READY:
                self._end()
                raise OutsideError(f"{sys.executable} cannot be started to check the footers of Parquet files")
        assert self._process.stdin
        assert self._process.stdout
        return self._process.stdin, self._process.stdout

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._parent == os.getpid():
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[bytes]:
    """A process that finds the same modules as this one; threads would only reserve memory."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _line(stdout: IO[bytes]) -> bytes:
    """One line; less if the child ends or falls silent."""
    ready, _, _ = select.select([stdout], [], [], _REPLY_S)
    return stdout.readline() if ready else b""


_child = _Child()
atexit.register(_child.close)
