"""A folder as a bucket: every blob is a file, put in place by one rename."""

import errno
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vaejob.errors import BucketError, ObjectMissing
from vaejob.storage.bucket import LEFTOVER_S
from vaejob.storage.keys import check_span, checked, checked_folder, parent

_TEMPORARY = ".vaejob-"  # a writer that is killed leaves a file of this name, which is no key
PIECE_BYTES = 16 * 2**20  # of a read that tells how far it is
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DirectoryBucket:
    """Keys are paths below a folder, which is made by the first write; 'a' and 'a/b' cannot both be keys."""

    def __init__(self, path: str) -> None:
        self._root = Path(path).absolute()
        self.url = str(self._root)

    def read(
        self,
        key: str,
        start: int | None = None,
        stop: int | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> bytes:
        path = self._path(key)
        with self._reading(path), path.open("rb") as file:
            check_span(start, stop, os.fstat(file.fileno()).st_size, name=str(path))
            file.seek(start or 0)
            due = -1 if stop is None else stop - (start or 0)
            data = file.read(due) if on_bytes is None else _read_told(file, due, on_bytes)
        if stop is not None and len(data) != stop - (start or 0):
            raise BucketError(f"{path} became shorter while it was read")
        return data

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._writing(path), _temporary_beside(path, data) as temporary:
            temporary.replace(path)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._writing(path), _temporary_beside(path, data) as temporary:
            return _link(temporary, path)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with self._reading(path):
            return path.stat().st_size if path.is_file() else None

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._walk(parent(prefix)) if key.startswith(prefix))

    def versions(self, prefix: str = "") -> dict[str, str]:
        found = {}
        for key in self.keys(prefix):
            with self._reading(self._root / key), suppress(*_NO_FILE):
                found[key] = file_version((self._root / key).stat())
        return found

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._root / checked_folder(prefix)
        with self._reading(folder), suppress(*_NO_FILE):
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            return sorted(name for name in names if any(self._walk(f"{prefix}{name}/")))
        return []

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._reading(path.parent), self._writing(path), suppress(*_NO_FILE):
            path.unlink()
            self._remove_empty_folders(path.parent)

    def remove_leftovers(self, *, older_than_s: float = LEFTOVER_S) -> int:
        before, found = time.time() - older_than_s, 0
        for path in self._root.rglob(f"{_TEMPORARY}*"):
            with suppress(OSError):  # its writer lives and has just finished, or it is not ours to delete
                if path.stat().st_mtime < before:
                    path.unlink()
                    found += 1
        return found

    def _path(self, key: str) -> Path:
        return self._root / checked(key, url=self.url)

    def _walk(self, folder: str) -> Iterator[str]:
        with self._reading(self._root / folder):
            for where, _, names in os.walk(self._root / folder, onerror=_raise_unless_gone):
                below = Path(where).relative_to(self._root)
                yield from ((below / name).as_posix() for name in names if not name.startswith(_TEMPORARY))

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:  # it holds something, or another did it
                return
            folder = folder.parent

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Turns what the operating system says into one line about the path."""
        if self._root.exists() and not self._root.is_dir():
            raise BucketError(f"{self.url} is a file; a bucket must be a folder")
        try:
            yield
        except _NO_FILE as error:
            raise ObjectMissing(f"{path}: there is no such file") from error
        except OSError as error:
            raise BucketError(f"{path} cannot be read: {error.strerror}") from error

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, NotADirectoryError) as error:
            raise BucketError(f"{path} cannot be written: one of the folders above it is a file") from error
        except OSError as error:
            raise BucketError(f"{path} cannot be written: {error.strerror}") from error


def file_version(status: os.stat_result) -> str:
    """What `versions` says of a file."""
    return f"{status.st_size} {status.st_mtime_ns}"


@contextmanager
def _temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file in the same folder that holds the data on disk, gone afterwards unless it was renamed."""
    temporary = path.with_name(_TEMPORARY + secrets.token_hex(8))
    try:
        with os.fdopen(_open_new(temporary), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open_new(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    for _ in range(100):  # another's delete may remove the empty folder between the two lines
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, flags, 0o666)
        except FileNotFoundError:
            continue
    return os.open(path, flags, 0o666)


def _link(temporary: Path, path: Path) -> bool:
    """Gives the file its name unless the name is taken; exactly one of many callers succeeds."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # NFS may repeat a request whose reply was lost: then the name is ours
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise BucketError(f"{path.parent}: its file system has no hard links, which a bucket needs") from error
        raise
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, _NO_FILE):
        raise error


def _read_told(file: BinaryIO, due: int, on_bytes: Callable[[int], None]) -> bytes:
    """As file.read(due), in pieces."""
    whole = io.BytesIO()  # its getvalue() hands out its memory without copying it
    while data := file.read(PIECE_BYTES if due < 0 else min(PIECE_BYTES, due - whole.tell())):
        whole.write(data)
        on_bytes(len(data))
    return whole.getvalue()
