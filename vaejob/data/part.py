"""One split on its way into shards: those that an interrupted run left complete, then those that are written now."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeVar

from vaejob.data.ahead import map_ahead
from vaejob.data.fingerprint import sample_digest
from vaejob.data.manifest import Shard
from vaejob.data.recipe import Recipe, prepare
from vaejob.data.shards import Row, describe_shard, encode_shard, is_ours, shard_plan
from vaejob.data.sources import ImageSource
from vaejob.data.verify import shard_digests
from vaejob.errors import DataError, ObjectMissing
from vaejob.storage import Bucket, join

Item = TypeVar("Item")


class Packed(NamedTuple):
    """A shard that lies in its bucket, and the sum of its samples' digests."""

    shard: Shard
    digests: int


class Loaded(NamedTuple):
    """A sample ready to be stored, and its digest."""

    row: Row
    digest: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of a source, and the data set it becomes."""

    source: ImageSource
    split: str
    indices: list[int]
    bucket: Bucket
    recipe: Recipe
    shard_bytes: int
    row_group_bytes: int

    def plan(self) -> str:
        """Hash of all that decides the bytes of the shards."""
        samples = [self.source.samples[index] for index in self.indices]
        settings = (*self.recipe.settings(), self.shard_bytes, self.row_group_bytes)
        return hashlib.sha256(json.dumps([settings, samples]).encode()).hexdigest()


def packed_shards(part: Part, plan: str, *, on_images: Callable[[int], None]) -> Iterator[Packed]:
    """The shards that an interrupted run left complete, then those that are written now."""
    number, rows = 0, 0
    for packed in _kept_shards(part, plan):
        number, rows = number + 1, rows + packed.shard.rows
        on_images(packed.shard.rows)
        yield packed
    row_groups = _by_bytes(_load(part, start=rows), limit=part.row_group_bytes, size=_row_bytes)
    counted = _counted(row_groups, on_images)
    shards = _by_bytes(counted, limit=part.shard_bytes, size=lambda group: sum(map(_row_bytes, group)))
    for key, groups in zip(map(_shard_key, count(number)), shards, strict=False):
        yield _write_shard(part, key, groups, plan=plan)


def _kept_shards(part: Part, plan: str) -> Iterator[Packed]:
    rows = 0
    for key in map(_shard_key, count()):
        packed = _kept_shard(part, key, first_id=rows, plan=plan)
        if packed is None:
            return
        rows += packed.shard.rows
        yield packed


def _kept_shard(part: Part, key: str, *, first_id: int, plan: str) -> Packed | None:
    """The shard of this plan under the key; None if there is none, or a damaged one."""
    try:
        data = part.bucket.read(key)
    except ObjectMissing:
        return None
    if not is_ours(data):
        raise DataError(f"{join(part.bucket.url, key)} was not written by vaejob pack; choose another DEST")
    if shard_plan(data) != plan:
        return None
    shard = describe_shard(key, data)
    try:
        return Packed(shard, shard_digests(shard, data, first_id=first_id, shape=part.recipe.shape))
    except DataError:  # a copy of another shard
        return None


def _load(part: Part, *, start: int) -> Iterator[Loaded]:
    """The samples of a split from row `start` on."""

    def load(sample_id: int) -> Loaded:
        index = part.indices[sample_id]
        image, stored = prepare(part.source, index, part.recipe)
        return Loaded(Row(sample_id, part.source.samples[index].key, stored), sample_digest(sample_id, image))

    return map_ahead(load, range(start, len(part.indices)))


def _row_bytes(loaded: Loaded) -> int:
    return len(loaded.row.image)


def _write_shard(part: Part, key: str, groups: list[list[Loaded]], *, plan: str) -> Packed:
    rows = [[loaded.row for loaded in group] for group in groups]
    data = encode_shard(rows, image_bytes=part.recipe.image_bytes, plan=plan)
    part.bucket.write(key, data)
    return Packed(describe_shard(key, data), sum(loaded.digest for group in groups for loaded in group))


def _by_bytes(items: Iterable[Item], *, limit: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items in lists of at most `limit` bytes, but at least one item."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and total + size(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def _counted(groups: Iterable[list[Item]], on_images: Callable[[int], None]) -> Iterator[list[Item]]:
    for group in groups:
        on_images(len(group))
        yield group


def _shard_key(number: int) -> str:
    return f"{number:05d}.parquet"
