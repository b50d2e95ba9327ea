"""The bytes of one file, local or in a bucket, as a read-only map that needs no memory and no closing."""

import fnmatch
import gzip
import mmap
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from vaejob.errors import BucketError, DataError
from vaejob.storage import open_bucket, split_address

_CHUNK_BYTES = 64 << 20


def local_path(address: str) -> Path | None:
    """The path behind an address; None if it is in a bucket."""
    if "://" not in address:
        return Path(address).expanduser()
    parts = urlsplit(address)
    return Path(parts.path) if parts.scheme == "file" else None


def is_file(address: str) -> bool:
    if (path := local_path(address)) is not None:
        return path.is_file()
    parent, name = split_address(address)
    return not parent.endswith(":/") and open_bucket(parent).size(name) is not None


def files_in(address: str) -> tuple[str, list[str]]:
    """A folder's address and the files below it, sorted; the last part of the address may be a pattern such as *.tar."""
    parent, pattern = split_address(address)
    is_pattern = re.search(r"[*?\[]", pattern) is not None
    folder = parent if is_pattern else address
    names = [name for name in open_bucket(folder).keys() if not is_hidden(name)]  # noqa: SIM118 - a bucket is no dict
    return folder, fnmatch.filter(names, pattern) if is_pattern else names


def is_hidden(name: str) -> bool:
    """Whether a path is one of the files that file managers and macOS archives leave beside images."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def map_file(address: str) -> mmap.mmap:
    """The bytes of a file; what is remote or ends in .gz or .tgz passes through an unnamed temporary file."""
    try:
        if not address.lower().endswith((".gz", ".tgz")):
            with _opened(address) as file:
                return _map(file)
        with _opened(address) as packed, gzip.open(packed) as file, tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked, _CHUNK_BYTES)
            return _map(unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{address} is no complete gzip file: {error}") from error
    except ValueError as error:  # mmap refuses what is empty
        raise DataError(f"{address} is empty") from error
    except OSError as error:
        raise BucketError(f"{address} cannot be read: {error.strerror or error}") from error


def _map(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _opened(address: str) -> Iterator[IO[bytes]]:
    if (path := local_path(address)) is not None:
        with path.open("rb") as file:
            yield file
        return
    parent, name = split_address(address)
    bucket = open_bucket(parent)
    size = bucket.size(name) or 0
    with tempfile.TemporaryFile() as copy:
        for start in range(0, size, _CHUNK_BYTES):
            copy.write(bucket.read(name, start, min(start + _CHUNK_BYTES, size)))
        copy.seek(0)
        yield copy
