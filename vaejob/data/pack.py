"""Packing: from any source of images to Parquet shards and, last of all, their manifest.

source --bytes or pixels--> image --stored bytes--> rows --> row groups --> shards --> manifest

Each split is a data set of its own. The same source and settings give the same bytes, so packing that was interrupted is
finished by repeating it: the complete shards of the same plan are checked and kept.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeVar

from vaejob.data.ahead import map_ahead
from vaejob.data.fingerprint import fingerprint, sample_digest
from vaejob.data.manifest import MANIFEST_KEY, Manifest, Shard, read_manifest, write_manifest
from vaejob.data.recipe import Encoding, Recipe, choose_recipe, prepare
from vaejob.data.shards import Row, describe_shard, encode_shard, shard_metadata
from vaejob.data.sources import ImageSource, open_source
from vaejob.data.splits import divide, parse_split
from vaejob.data.verify import shard_digests
from vaejob.errors import DataError, ObjectMissing
from vaejob.storage import Bucket, join, open_bucket

SHARD_BYTES = 64 << 20
ROW_GROUP_BYTES = 1 << 20

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


def pack(
    source: ImageSource | str,
    dest: str,
    *,
    split: str = "train",
    size: int | None = None,
    encoding: Encoding = "auto",
    shard_bytes: int = SHARD_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Packs a source into the folders dest/<split>, and returns their manifests.

    Raises DataError for an image that cannot be used, and where other data is in the way.
    """
    images = open_source(source) if isinstance(source, str) else source
    fractions = parse_split(split)
    if not images.samples:
        raise DataError(f"{images.description}: there is nothing to pack")
    chosen = divide([sample.key for sample in images.samples], fractions)
    if empty := [name for name, indices in chosen.items() if not indices]:
        raise DataError(
            f"split {empty[0]} would be empty; {len(images.samples)} images are too few for --split {split}"
        )
    recipe = choose_recipe(images, size=size, encoding=encoding)
    parts = [
        Part(
            source=images,
            split=name,
            indices=indices,
            bucket=open_bucket(join(dest, name)),
            recipe=recipe,
            shard_bytes=shard_bytes,
            row_group_bytes=row_group_bytes,
        )
        for name, indices in chosen.items()
    ]
    finished = {part.split: manifest for part in parts if (manifest := _finished(part)) is not None}
    report = _progress(on_progress, total=sum(len(part.indices) for part in parts if part.split not in finished))
    return {part.split: finished.get(part.split) or _pack_part(part, on_images=report) for part in parts}


def _finished(part: Part) -> Manifest | None:
    """The manifest that is there already. Raises DataError if it is of another plan."""
    if part.bucket.size(MANIFEST_KEY) is None:
        return None
    manifest = read_manifest(part.bucket)
    if manifest.plan != part.plan():
        was = f"{part.bucket.url} was packed from other images or with other settings ({manifest.source})"
        raise DataError(f"{was}; delete it, or choose another DEST")
    return manifest


def _pack_part(part: Part, *, on_images: Callable[[int], None]) -> Manifest:
    plan = part.plan()
    packed = list(_all_shards(part, plan, on_images=on_images))
    _delete_strays(part.bucket, kept={shard.key for shard, _ in packed})
    channels, height, width = part.recipe.shape
    resized = f", cropped and resized to {part.recipe.size} x {part.recipe.size}" if part.recipe.size else ""
    manifest = Manifest(
        split=part.split,
        images=len(part.indices),
        channels=channels,
        height=height,
        width=width,
        encoding=part.recipe.encoding,
        fingerprint=fingerprint(sum(digests for _, digests in packed)),
        source=part.source.description + resized,
        plan=plan,
        shards=tuple(shard for shard, _ in packed),
    )
    write_manifest(part.bucket, manifest)  # the data set exists once its manifest does
    return manifest


def _all_shards(part: Part, plan: str, *, on_images: Callable[[int], None]) -> Iterator[Packed]:
    """The shards that an interrupted run left complete, then those that are written now."""
    number, rows = 0, 0
    for packed in _kept_shards(part, plan):
        number, rows = number + 1, rows + packed.shard.rows
        on_images(packed.shard.rows)
        yield packed
    row_groups = _by_bytes(_load(part, start=rows), limit=part.row_group_bytes, size=_row_bytes)
    shards = _by_bytes(
        _counted(row_groups, on_images), limit=part.shard_bytes, size=lambda group: sum(map(_row_bytes, group))
    )
    for key, groups in zip(map(_shard_key, count(number)), shards, strict=False):
        yield _write_shard(part.bucket, key, groups, image_bytes=part.recipe.image_bytes, plan=plan)


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
        shard = describe_shard(key, data)
    except (ObjectMissing, DataError):
        return None
    metadata = shard_metadata(data)
    if "vaejob.plan" not in metadata:
        raise DataError(f"{join(part.bucket.url, key)} was not written by vaejob pack; choose another DEST")
    if metadata["vaejob.plan"] != plan:
        return None
    try:
        digests = shard_digests(shard, data, first_id=first_id, shape=part.recipe.shape)
    except DataError:
        return None
    return Packed(shard, digests) if fingerprint(digests) == metadata["vaejob.fingerprint"] else None


def _load(part: Part, *, start: int) -> Iterator[Loaded]:
    """The samples of a split from row `start` on."""

    def load(sample_id: int) -> Loaded:
        index = part.indices[sample_id]
        image, stored = prepare(part.source, index, part.recipe)
        return Loaded(Row(sample_id, part.source.samples[index].key, stored), sample_digest(sample_id, image))

    return map_ahead(load, range(start, len(part.indices)))


def _row_bytes(loaded: Loaded) -> int:
    return len(loaded.row.image)


def _write_shard(bucket: Bucket, key: str, groups: list[list[Loaded]], *, image_bytes: int | None, plan: str) -> Packed:
    digests = sum(loaded.digest for group in groups for loaded in group)
    rows = [[loaded.row for loaded in group] for group in groups]
    metadata = {"vaejob.plan": plan, "vaejob.fingerprint": fingerprint(digests)}
    data = encode_shard(rows, image_bytes=image_bytes, metadata=metadata)
    bucket.write(key, data)
    return Packed(describe_shard(key, data), digests)


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


def _delete_strays(bucket: Bucket, *, kept: set[str]) -> None:
    """Removes what an earlier run with smaller shards left behind."""
    for key in bucket.keys():  # noqa: SIM118 - a bucket is no dict
        if re.fullmatch(r"\d{5,}\.parquet", key) and key not in kept:
            bucket.delete(key)


def _progress(on_progress: Callable[[int, int], None] | None, *, total: int) -> Callable[[int], None]:
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    return add
