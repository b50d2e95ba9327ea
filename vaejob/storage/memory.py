"""A bucket in this process, for tests and trials: every MemoryBucket of one address holds the same blobs."""

import zlib
from collections import defaultdict
from collections.abc import Callable
from threading import Lock

from vaejob.errors import ObjectMissing
from vaejob.storage.bucket import LEFTOVER_S
from vaejob.storage.keys import checked, checked_folder, folders_among, parent, spanned

_blobs: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
_lock = Lock()


class MemoryBucket:
    """Lives as long as the process; a Ray worker sees another one."""

    def __init__(self, address: str) -> None:
        self.url = address.rstrip("/")

    def read(
        self,
        key: str,
        start: int | None = None,
        stop: int | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> bytes:
        with _lock:
            data = _blobs[self.url].get(checked(key, url=self.url))
        if data is None:
            raise ObjectMissing(f"{self.url}/{key}: there is no such blob")
        read = spanned(data, start, stop, name=f"{self.url}/{key}")
        if on_bytes is not None:
            on_bytes(len(read))
        return read

    def write(self, key: str, data: bytes) -> None:
        with _lock:
            _blobs[self.url][checked(key, url=self.url)] = bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        with _lock:
            blobs = _blobs[self.url]
            if checked(key, url=self.url) in blobs:
                return False
            blobs[key] = bytes(data)
            return True

    def size(self, key: str) -> int | None:
        with _lock:
            data = _blobs[self.url].get(checked(key, url=self.url))
        return None if data is None else len(data)

    def keys(self, prefix: str = "") -> list[str]:
        parent(prefix)
        with _lock:
            return sorted(key for key in _blobs[self.url] if key.startswith(prefix))

    def versions(self, prefix: str = "") -> dict[str, str]:
        keys = self.keys(prefix)
        with _lock:
            blobs = {key: _blobs[self.url][key] for key in keys if key in _blobs[self.url]}
        return {key: f"{len(data)} {zlib.crc32(data):08x}" for key, data in blobs.items()}

    def folders(self, prefix: str = "") -> list[str]:
        with _lock:
            return folders_among(_blobs[self.url], checked_folder(prefix))

    def delete(self, key: str) -> None:
        with _lock:
            _blobs[self.url].pop(checked(key, url=self.url), None)

    def remove_leftovers(self, *, older_than_s: float = LEFTOVER_S) -> int:
        return 0
