"""A folder tree of images, and several sources as one."""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from vaejob.data.sources.files import local_path
from vaejob.data.sources.source import ImageSource, Sample, printable
from vaejob.storage import Bucket, join, open_bucket


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, local or in a bucket; a key is the path below it."""

    address: str
    names: list[str]
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        with ThreadPoolExecutor() as pool:
            return [
                Sample(printable(name), found)
                for name, found in zip(self.names, pool.map(self._identity, self.names), strict=True)
            ]

    def read(self, index: int) -> bytes:
        return self._bucket.read(self.names[index])

    @cached_property
    def _bucket(self) -> Bucket:
        return open_bucket(self.address)

    def _identity(self, name: str) -> str:
        path = local_path(join(self.address, name))
        if path is None:
            return str(self._bucket.size(name))
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class JoinedSource:
    """Several sources one after the other; each key begins with the name of its part."""

    description: str
    parts: dict[str, ImageSource]

    @cached_property
    def samples(self) -> list[Sample]:
        named = self.parts.items()
        return [Sample(f"{name}/{key}", identity) for name, part in named for key, identity in part.samples]

    def read(self, index: int) -> bytes | np.ndarray:
        part = bisect_right(self._starts, index) - 1
        return list(self.parts.values())[part].read(index - self._starts[part])

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((len(part.samples) for part in self.parts.values()), initial=0))[:-1]
