"""A folder tree of images, and several sources as one."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from vaejob.data.sources.source import ImageSource, Reopened, Sample, printable
from vaejob.storage import Bucket, open_bucket


@dataclass(frozen=True)
class FolderSource(Reopened):
    """Image files below a folder, local or in a bucket; a key is the path below it."""

    address: str
    versions: dict[str, str]
    """As its bucket listed them, by name."""
    description: str

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(printable(name), version) for name, version in self.versions.items()]

    def read(self, index: int) -> bytes:
        return self._bucket.read(self._names[index])

    @cached_property
    def _bucket(self) -> Bucket:
        return open_bucket(self.address)

    @cached_property
    def _names(self) -> list[str]:
        return list(self.versions)


@dataclass(frozen=True)
class JoinedSource(Reopened):
    """Several sources one after the other; each key begins with the name of its part."""

    description: str
    parts: dict[str, ImageSource]

    @cached_property
    def samples(self) -> list[Sample]:
        named = self.parts.items()
        return [Sample(f"{name}/{key}", identity) for name, part in named for key, identity in part.samples]

    def read(self, index: int) -> bytes | np.ndarray:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part].read(index - self._starts[part])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_starts": self._starts}

    @cached_property
    def _parts(self) -> list[ImageSource]:
        return list(self.parts.values())

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((len(part.samples) for part in self.parts.values()), initial=0))[:-1]
