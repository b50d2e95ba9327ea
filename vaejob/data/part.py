"""One split on its way into shards. Which images a shard holds is arithmetic, so any shard can be packed by itself."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vaejob.data.ahead import map_ahead
from vaejob.data.fingerprint import sample_digest
from vaejob.data.manifest import Shard
from vaejob.data.recipe import Recipe, prepare
from vaejob.data.shards import Row, describe_shard, encode_shard, is_ours, is_whole, plain_images
from vaejob.data.sources import ImageSource
from vaejob.data.sources.source import Reopened
from vaejob.data.verify import check_ids, images_digests
from vaejob.errors import DataError, ObjectMissing
from vaejob.storage import Bucket, join, open_bucket

PACKING_KEY = "packing.json"
"""The plan of the shards that are being written; it goes once the manifest is there."""

SHARDS_AT_ONCE = 2


class Packed(NamedTuple):
    """A shard that lies in its bucket."""

    shard: Shard
    row_groups: np.ndarray
    """Its row groups, dtype ROW_GROUP."""
    digests: int
    """The sum of its samples' digests."""


@dataclass(frozen=True, kw_only=True)
class Part(Reopened):
    """One split of a source, and the data set it becomes."""

    source: ImageSource
    split: str
    indices: list[int]
    address: str
    recipe: Recipe
    group_rows: int
    """Images of each row group; of a shard's last, perhaps fewer."""
    shard_rows: int
    """Images of each shard; of the last, perhaps fewer."""
    shard_bytes: int
    """Size of the largest shard, about."""

    @cached_property
    def bucket(self) -> Bucket:
        return open_bucket(self.address)

    @property
    def num_shards(self) -> int:
        return -(-len(self.indices) // self.shard_rows)

    def rows(self, number: int) -> range:
        """Sample ids of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, len(self.indices)))

    @cached_property
    def plan(self) -> str:
        """Hash of all that decides the bytes of the shards."""
        samples = [self.source.samples[index] for index in self.indices]
        settings = (*self.recipe.settings(), self.group_rows, self.shard_rows)
        return hashlib.sha256(json.dumps([settings, samples]).encode()).hexdigest()


def begin(part: Part) -> None:
    """Makes room: shards of another plan go, those of this plan stay. Raises DataError for files that are not ours."""
    try:
        if json.loads(part.bucket.read(PACKING_KEY)) == {"plan": part.plan}:
            return
    except (ObjectMissing, ValueError):
        pass
    for key in _shard_keys(part.bucket):
        size = part.bucket.size(key) or 0
        if not is_ours(part.bucket.read(key, max(0, size - 2**16), size)):
            raise DataError(f"{join(part.bucket.url, key)} was not written by vaejob pack; choose another DEST")
    for key in _shard_keys(part.bucket):
        part.bucket.delete(key)
    part.bucket.write(PACKING_KEY, json.dumps({"plan": part.plan}).encode())


def pack_here(part: Part, *, on_images: Callable[[int], None]) -> Iterator[Packed]:
    """All shards of a part, in order: those that an interrupted run left whole are kept, the others written now."""
    yield from map_ahead(
        lambda number: pack_shard(part, number, on_images=on_images), range(part.num_shards), threads=SHARDS_AT_ONCE
    )


def pack_shard(part: Part, number: int, *, on_images: Callable[[int], None] = lambda images: None) -> Packed:
    """One shard, which may be there already. Its bytes depend on the part and the number alone."""
    key = f"{number:05d}.parquet"
    if (kept := _kept_shard(part, key, number)) is not None:
        on_images(kept.shard.rows)
        return kept
    groups, group, digests = list[list[Row]](), list[Row](), 0
    for row, digest in map_ahead(lambda sample_id: _load(part, sample_id), part.rows(number)):
        group.append(row)
        digests += digest
        if len(group) == part.group_rows:
            groups, group = [*groups, group], []
            on_images(part.group_rows)
    groups += [group] if group else []
    on_images(len(group))
    data = encode_shard(groups, image_bytes=part.recipe.image_bytes)
    part.bucket.write(key, data)
    return Packed(*describe_shard(key, data, image_bytes=part.recipe.image_bytes), digests)


def _kept_shard(part: Part, key: str, number: int) -> Packed | None:
    """The shard of this plan under the key; None if there is none, or a damaged one."""
    try:
        data = part.bucket.read(key)
    except ObjectMissing:
        return None
    if not is_whole(data):
        return None
    image_bytes, rows = part.recipe.image_bytes, part.rows(number)
    shard, row_groups = describe_shard(key, data, image_bytes=image_bytes)
    digests, first_id = 0, rows.start
    try:
        check_ids(shard, data, rows=rows)
        for count, size, offset, _ in row_groups.tolist():
            images = plain_images(key, data[offset : offset + size], rows=count, image_bytes=image_bytes)
            digests += images_digests(images, first_id=first_id, shape=part.recipe.shape, name=key)
            first_id += count
    except DataError:  # a copy of another shard
        return None
    return Packed(shard, row_groups, digests)


def _load(part: Part, sample_id: int) -> tuple[Row, int]:
    """A sample as it is stored, and its digest."""
    index = part.indices[sample_id]
    image, stored = prepare(part.source, index, part.recipe)
    return Row(sample_id, part.source.samples[index].key, stored), sample_digest(sample_id, image)


def _shard_keys(bucket: Bucket) -> list[str]:
    return [key for key in bucket.keys() if re.fullmatch(r"\d{5,}\.parquet", key)]  # noqa: SIM118 - a bucket is no dict
