"""A cache of row groups on local disk that all processes of a node share without a lock.

    <folder>/<data set>/<name>      an entry; whole or damaged, which its size and crc32 tell
    <folder>/<data set>/.last-use   an empty file whose mtime says when a job last used the data set
    <folder>/.vaejob-<bytes>-...    an entry being written: its name announces the bytes before they are there

Epochs pass over the same data again and again, so that the least recently used entry is the one needed next: entries of
the data set in use stay, new ones are not kept once the limit is reached, and only other data sets make room.

The limit: an entry is announced, then everything in the folder is counted, announcements first, and it is written if the
count is at most 15/16 of `limit_bytes`. Of two writers, the one that counts last sees the other. A count also allows
limit/256 more to its writer, uncounted; W writers (`DiskCache` objects that write at once) thus fill at most
limit * (15/16 + W/256) bytes of files, unfinished ones included: for up to 16 of them, never more than the limit.

A process may die at any instruction. What it leaves is an entry, or an announced file that a later count removes.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

WRITERS = 16
UNCOUNTED = 256  # a writer counts again after this part of the limit
STAMP_SECONDS = 60
LEFTOVER_SECONDS = 3600

_LAST_USE = ".last-use"
_ANNOUNCED = re.compile(r"\.vaejob-(?P<bytes>\d+)-(?P<pid>\d{1,9})-[0-9a-f]{16}-(?P<host>.*)")


class _Entry(NamedTuple):
    """Sorts by how long it has not been used."""

    data_set_used: float
    written: float
    size: int
    data_set: str
    path: str


class DiskCache:
    """Row groups of one data set. What goes wrong costs a miss, never an exception."""

    def __init__(self, folder: str | Path, *, limit_bytes: int, data_set: str) -> None:
        self._folder = Path(folder).absolute()
        self._own = self._folder / data_set
        self._limit_bytes = limit_bytes
        self._usable_bytes = limit_bytes - limit_bytes * WRITERS // UNCOUNTED
        self._uncounted_bytes = 0  # how much more the last count decides
        self._has_room = False  # what it decided
        self._counting = Lock()
        self._stamp_due = 0.0
        self._tallying = Lock()
        self.hits = 0
        self.misses = 0  # the damaged ones among them
        self.damaged = 0
        self.trouble: str | None = None  # why nothing more is written; what is there is still read
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._stamp()
        except OSError as error:
            self._give_up(error)

    def get(self, name: str, *, size: int, crc32: int) -> bytes | None:
        """The entry if it is there and whole; a damaged one is removed."""
        if time.monotonic() >= self._stamp_due:
            with suppress(OSError):
                self._stamp()
        data, damaged = None, False
        try:
            with (self._own / name).open("rb") as file:
                data = file.read(size + 1)
            damaged = len(data) != size or zlib.crc32(data) != crc32
        except OSError as error:
            damaged = error.errno in (errno.EISDIR, errno.EIO)
        if damaged:
            _remove(self._own / name)
        whole = data is not None and not damaged
        with self._tallying:
            self.hits += whole
            self.misses += not whole
            self.damaged += damaged
        return data if whole else None

    def put(self, name: str, data: bytes) -> None:
        """Keeps a copy if there is room; after the first error of the disk, `trouble` names it and nothing is kept."""
        assert Path(name).name == name, name
        if self.trouble is None and len(data) <= self._usable_bytes:
            try:
                self._announce_and_write(name, data)
            except OSError as error:
                self._give_up(error)

    def _announce_and_write(self, name: str, data: bytes) -> None:
        announced = f".vaejob-{len(data)}-{os.getpid()}-{secrets.token_hex(8)}-{socket.gethostname()}"
        temporary = self._folder / announced
        try:
            with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                if not self._may_write(len(data)):
                    return
                file.write(data)
            # Another may have taken us for dead, or the data set's folder away: then this one is not kept.
            with suppress(FileNotFoundError, IsADirectoryError):
                temporary.replace(self._own / name)
        finally:
            temporary.unlink(missing_ok=True)

    def _may_write(self, size: int) -> bool:
        with self._counting:
            if size <= self._uncounted_bytes:
                self._uncounted_bytes -= size
            else:
                self._has_room = self._make_room()
                self._uncounted_bytes = self._limit_bytes // UNCOUNTED
            return self._has_room

    def _make_room(self) -> bool:
        """Whether all that is announced has room, if need be once entries of other data sets have gone."""
        self._stamp()
        announced_bytes = sum(_announced_bytes(self._folder))
        entries = list(_entries(self._folder))
        total_bytes = announced_bytes + sum(entry.size for entry in entries)
        for entry in sorted(self._removable(entries, announced_bytes)):
            if total_bytes <= self._usable_bytes:
                break
            Path(entry.path).unlink(missing_ok=True)
            total_bytes -= entry.size
        return total_bytes <= self._usable_bytes

    def _removable(self, entries: list[_Entry], announced_bytes: int) -> list[_Entry]:
        own_bytes = sum(entry.size for entry in entries if entry.data_set == self._own.name)
        if own_bytes > self._limit_bytes:  # which has been lowered
            return entries
        if own_bytes + announced_bytes > self._usable_bytes:  # no removal of others would be enough
            return []
        return [entry for entry in entries if entry.data_set != self._own.name]

    def _stamp(self) -> None:
        self._stamp_due = time.monotonic() + STAMP_SECONDS
        self._own.mkdir(mode=0o700, exist_ok=True)
        (self._own / _LAST_USE).touch(mode=0o600)

    def _give_up(self, error: OSError) -> None:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is where a folder must be" if no_folder else error.strerror
        self.trouble = self.trouble or f"{self._folder}: nothing more is cached there ({reason})"


def _entries(folder: Path) -> Iterator[_Entry]:
    """Of all data sets; what is in a folder without a stamp is not ours."""
    for data_set in folder.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            used = (data_set / _LAST_USE).stat().st_mtime
            with os.scandir(data_set) as files:
                for file in files:
                    with suppress(FileNotFoundError):
                        if file.name != _LAST_USE and file.is_file(follow_symlinks=False):
                            found = file.stat(follow_symlinks=False)
                            yield _Entry(used, found.st_mtime, found.st_size, data_set.name, file.path)


def _announced_bytes(folder: Path) -> Iterator[int]:
    """Of each entry that is being written; what a dead writer announced is removed."""
    for path in folder.iterdir():
        if announced := _ANNOUNCED.fullmatch(path.name):
            if _is_left_over(path, pid=int(announced["pid"]), host=announced["host"]):
                path.unlink(missing_ok=True)
            else:
                yield int(announced["bytes"])


def _is_left_over(path: Path, *, pid: int, host: str) -> bool:
    try:
        if host == socket.gethostname():
            os.kill(pid, 0)  # only asks whether the process is there
        return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
    except ProcessLookupError:
        return True
    except (PermissionError, FileNotFoundError):  # another user's, or it has just become an entry
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
