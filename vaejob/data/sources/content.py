"""The bytes of one file, local or in a bucket, read by ranges; another process is sent its address and version alone.

address --stored bytes--> blocks or open files, a few at a time --unpacked if .gz or .tgz--> ranges
"""

import gzip
import io
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from vaejob.data.sources.recent import Recent
from vaejob.errors import BucketError, DataError, ObjectMissing, VaejobError
from vaejob.storage import Bucket, open_bucket, split_address
from vaejob.storage.directory import file_version

BLOCK_BYTES = 8 << 20
"""What is fetched of a remote file at a time, unless more is asked for at once."""

_COPY_BYTES = 1 << 20
_WINDOW_BYTES = 64 << 10
_PREAD_BYTES = 1 << 30

# More of each than threads use at once, and few enough for the memory, file descriptors and disk of one process.
_blocks: Recent[tuple[str, str, int], bytes] = Recent(most=16)
_open_files: Recent[tuple[str, str], "_OpenFile"] = Recent(most=64)
_unpacked: Recent[tuple[str, str], "_OpenFile"] = Recent(most=16)

_ahead = ThreadPoolExecutor(4, thread_name_prefix="vaejob-read-ahead")
_buckets: "weakref.WeakValueDictionary[str, Bucket]" = weakref.WeakValueDictionary()
_lock = Lock()


class Content:
    """The bytes that a file held when its version was looked up. Reading anything else raises DataError or BucketError.

    Safe from several threads; nothing is contacted or opened before it is needed.
    """

    def __init__(self, address: str, version: str | None = None) -> None:
        self.address = address
        self.version = version_of(address) if version is None else version
        self._stored_size = int(self.version.split()[0])
        self._path = local_path(address)
        self._opened: Callable[[], _OpenFile | None] = lambda: None
        self._remote: tuple[Bucket, str] | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.address, self.version)

    @property
    def size(self) -> int:
        return self._stored_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which must be there."""
        if stop - start > BLOCK_BYTES or self._path is not None:
            return self.read_once(start, stop)
        assert 0 <= start <= stop <= self.size, (self.address, start, stop)
        first, last = start // BLOCK_BYTES, max(start, stop - 1) // BLOCK_BYTES
        blocks = b"".join(self._block(number) for number in range(first, last + 1))
        return blocks[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def read_once(self, start: int, stop: int) -> bytes:
        """As `read`, by one request of just these bytes, which nobody is expected to ask for again."""
        assert 0 <= start <= stop <= self._stored_size, (self.address, start, stop)
        if self._path is None:
            return self._fetch(start, stop)
        with _reading(self.address):
            file = self._opened() or self._open(self._path)
            data = file.read(start, stop)
            self._check(file_version(os.fstat(file.descriptor)))
        return data

    def _open(self, path: Path) -> "_OpenFile":
        file = _open_files.get((self.address, self.version), lambda: _OpenFile(os.open(path, os.O_RDONLY)))
        self._opened = weakref.ref(file)  # closed when it is among the open files no more
        return file

    def _block(self, number: int) -> bytes:
        if self._has_block(number - 1) and (number + 1) * BLOCK_BYTES < self.size and not self._has_block(number + 1):
            _ahead.submit(self._get_block_if_possible, number + 1)
        return self._get_block(number)

    def _has_block(self, number: int) -> bool:
        return (self.address, self.version, number) in _blocks

    def _get_block(self, number: int) -> bytes:
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.size)
        return _blocks.get((self.address, self.version, number), lambda: self._fetch(start, stop))

    def _get_block_if_possible(self, number: int) -> None:
        with suppress(VaejobError):  # whoever needs the block asks again
            self._get_block(number)

    def _fetch(self, start: int, stop: int) -> bytes:
        if self._remote is None:
            parent, name = split_address(self.address)
            self._remote = _shared_bucket(parent), name
        bucket, name = self._remote
        data = bucket.read(name, start, stop)
        self._check(version_of(self.address))  # after reading: had it changed before, it would still be another
        return data

    def _check(self, found: str) -> None:
        if found != self.version:
            raise DataError(
                f"{self.address} was changed since it was listed: its size and version are {found}, they were {self.version}"
            )


class UnpackedContent(Content):
    """What a gzip file holds, from an unnamed temporary file; its version is that of the gzip file."""

    @property
    def size(self) -> int:
        return self._file.size

    def read(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= self.size, (self.address, start, stop)
        return self._file.read(start, stop)

    @property
    def _file(self) -> "_OpenFile":
        return _unpacked.get((self.address, self.version), self._unpack)

    def _unpack(self) -> "_OpenFile":
        stored = ContentFile(Content(self.address, self.version))
        try:
            with gzip.open(io.BufferedReader(stored, _COPY_BYTES)) as packed, tempfile.TemporaryFile() as file:
                shutil.copyfileobj(packed, file, _COPY_BYTES)
                file.flush()
                return _OpenFile(os.dup(file.fileno()))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.address} is no complete gzip file: {error}") from error
        except OSError as error:
            raise BucketError(f"{self.address} cannot be unpacked: {error.strerror or error}") from error


def open_content(address: str, version: str | None = None) -> Content:
    """The content of a file, unpacked if its name ends in .gz or .tgz. Raises DataError if it is empty."""
    kind = UnpackedContent if address.lower().endswith((".gz", ".tgz")) else Content
    content = kind(address, version)
    if content.size == 0:
        raise DataError(f"{address} is empty")
    return content


def version_of(address: str) -> str:
    """What `Bucket.versions` says of one file. Raises ObjectMissing if there is none."""
    if (path := local_path(address)) is not None:
        with _reading(address):
            return file_version(path.stat())
    parent, name = split_address(address)
    version = _shared_bucket(parent).versions(name).get(name)
    if version is None:
        raise ObjectMissing(f"{address}: there is no such object")
    return version


def local_path(address: str) -> Path | None:
    """The path behind an address; None if it is in a bucket."""
    if "://" not in address:
        return Path(address).expanduser()
    parts = urlsplit(address)
    return Path(parts.path) if parts.scheme == "file" else None


class ContentFile(io.RawIOBase):
    """A content as the file that tarfile, zipfile, numpy and pyarrow want; for one thread.

    A read of more than `most_bytes` is refused, where a file's own headers decide how much is read.
    """

    def __init__(self, content: Content, *, most_bytes: int | None = None) -> None:
        self._content = content
        self._most_bytes = most_bytes
        self._position = 0
        self._window_start, self._window = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0, self._position, self._content.size)[whence]
        if position < 0:
            raise ValueError(f"{self._content.address} has no byte {position}")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._content.size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if self._most_bytes is not None and count > self._most_bytes:
            raise DataError(
                f"{self._content.address} is damaged: it says that {count} bytes at {self._position} are a header"
            )
        data = self._read_window(self._position, self._position + count)
        self._position += count
        return data

    def _read_window(self, start: int, stop: int) -> bytes:
        """Headers are many and small, so what lies behind one is kept for the next."""
        if stop - start > _WINDOW_BYTES or start == stop:
            return self._content.read(start, stop) if start < stop else b""
        if not self._window_start <= start < stop <= self._window_start + len(self._window):
            self._window_start = start
            self._window = self._content.read(start, min(start + _WINDOW_BYTES, self._content.size))
        return self._window[start - self._window_start : stop - self._window_start]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _OpenFile:
    """A file of this machine, closed once nobody uses it. No mmap: reading one that was cut off ends the process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), or fewer if the file ends before."""
        if stop - start <= _PREAD_BYTES:
            return os.pread(self.descriptor, stop - start, start)
        spans = ((first, min(first + _PREAD_BYTES, stop)) for first in range(start, stop, _PREAD_BYTES))
        return b"".join(os.pread(self.descriptor, last - first, first) for first, last in spans)


def _shared_bucket(address: str) -> Bucket:
    """One client for all the files of a folder."""
    with _lock:
        bucket = _buckets.get(address)
        if bucket is None:
            bucket = _buckets[address] = open_bucket(address)
        return bucket


@contextmanager
def _reading(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(f"{address}: there is no such file") from error
    except OSError as error:
        raise BucketError(f"{address} cannot be read: {error.strerror or error}") from error
