"""Reading everything: a data set is what its manifest says, down to the last pixel."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vaejob.data.ahead import map_ahead
from vaejob.data.decode import decode_image
from vaejob.data.fingerprint import fingerprint, sample_digest
from vaejob.data.groups import parse_group, shards_bucket
from vaejob.data.inplace import Kind, read_file
from vaejob.data.manifest import MANIFEST_KEY, Manifest, Shard, read_manifest, read_row_groups
from vaejob.data.shards import Images
from vaejob.data.sources.content import open_content
from vaejob.errors import DataError, ObjectMissing
from vaejob.storage import Bucket, join, open_bucket


def data_sets(address: str) -> list[Bucket]:
    """The data set at an address, or those of the splits in the folders below it."""
    bucket = open_bucket(address)
    if bucket.size(MANIFEST_KEY) is None:
        below = [open_bucket(join(address, name)) for name in bucket.folders()]
        if splits := [split for split in below if split.size(MANIFEST_KEY) is not None]:
            return splits
    return [bucket]


def verify(bucket: Bucket, *, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of a data set, all of whose bytes, ids and images have been checked against it.

    Raises DataError, naming shard and row group, for the first thing that is wrong.
    """
    manifest = read_manifest(bucket)
    row_groups = read_row_groups(bucket, manifest)
    shards = shards_bucket(bucket, manifest)
    images, groups, digests = 0, 0, 0
    for shard in manifest.shards:
        own = row_groups[groups : groups + shard.row_groups]
        verified = _verified_shard if manifest.layout == "plain" else _verified_in_place
        digests += verified(shards, shard, own, first_id=images, manifest=manifest)
        images, groups = images + shard.rows, groups + shard.row_groups
        if on_progress is not None:
            on_progress(images, manifest.images)
    if (found := fingerprint(digests)) != manifest.fingerprint:
        raise DataError(
            f"{bucket.url}: the fingerprint of its images is {found}, the manifest says {manifest.fingerprint}"
        )
    return manifest


def images_digests(images: Images, *, first_id: int, shape: tuple[int, int, int], name: str) -> int:
    """The sum of the digests of consecutive images. Raises DataError, with that name, for one that has not the shape."""
    return sum(
        sample_digest(i, _pixels(image, f"{name} image {i}", shape)) for i, image in enumerate(images, start=first_id)
    )


def check_ids(shard: Shard, data: bytes, *, rows: range) -> None:
    """Raises DataError if the column of ids, read by Parquet's own reader, is not these rows.

    Only for bytes whose checksum is right: Parquet's parser may end the process over damaged ones.
    """
    # Not read_table, which asks Arrow's threads for the bytes: one may hold them until the interpreter ends, and abort it.
    ids = pq.ParquetFile(pa.BufferReader(data)).read(columns=["id"], use_threads=False)["id"].to_numpy()
    if not np.array_equal(ids, np.asarray(rows)):
        raise DataError(f"{shard.key}: its ids must be {rows.start} to {rows.stop - 1}, one after the other")


def _verified_shard(bucket: Bucket, shard: Shard, row_groups: np.ndarray, *, first_id: int, manifest: Manifest) -> int:
    name = join(bucket.url, shard.key)
    try:
        data = bucket.read(shard.key)
    except ObjectMissing:
        raise DataError(f"{name} is gone; pack the data again") from None
    if len(data) != shard.size:
        raise DataError(f"{name} has {len(data)} bytes, the manifest says {shard.size}; pack the data again")
    try:
        digests = _shard_digests(shard, row_groups, data, first_id=first_id, manifest=manifest)
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise DataError(f"{shard.key}: sha256 is {found}, the manifest says {shard.sha256}")
        check_ids(shard, data, rows=range(first_id, first_id + shard.rows))
    except DataError as error:
        raise DataError(f"{bucket.url}/{error}; pack the data again") from error
    return digests


def _verified_in_place(
    bucket: Bucket, shard: Shard, row_groups: np.ndarray, *, first_id: int, manifest: Manifest
) -> int:
    """The digests of a file of layout parquet, which may be large: it is indexed once more, and compared."""
    name, kind = join(bucket.url, shard.key), Kind(manifest.column, manifest.encoding, manifest.shape)
    try:
        content = open_content(name)
    except ObjectMissing:
        raise DataError(f"{name} is gone; index the data again") from None
    if content.size != shard.size:
        raise DataError(f"{name} has {content.size} bytes, the manifest says {shard.size}; index the data again")
    found = read_file(content, shard.key, kind, first_id=first_id, on_images=lambda images: None)
    for index, (group, expected) in enumerate(zip(found.row_groups, row_groups.tolist(), strict=False)):
        if group != list(expected):
            raise DataError(f"{name} row group {index}: it is {group}, the manifest says {list(expected)}; index again")
    if found.shard != shard:
        was = f"sha256 is {found.shard.sha256}, the manifest says {shard.sha256}"
        raise DataError(f"{name} is not what it was: {was}; index the data again")
    return found.digests


def _shard_digests(shard: Shard, row_groups: np.ndarray, data: bytes, *, first_id: int, manifest: Manifest) -> int:
    first_ids = first_id + np.cumsum(row_groups["rows"], dtype=np.int64) - row_groups["rows"]

    def digests(index: int) -> int:
        place, name = row_groups[index], f"{shard.key} row group {index}"
        body = data[int(place["offset"]) : int(place["offset"]) + int(place["size"])]
        images = parse_group(name, body, place, index, footer=None, shard=shard, manifest=manifest)
        return images_digests(images, first_id=int(first_ids[index]), shape=manifest.shape, name=name)

    return sum(map_ahead(digests, range(len(row_groups))))


def _pixels(image: Any, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    if isinstance(image, memoryview):
        return decode_image(image, name, shape=shape)
    return np.asarray(image).reshape(shape)
