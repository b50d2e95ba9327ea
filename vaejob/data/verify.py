"""Reading everything: a data set is what its manifest says, down to the last pixel."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vaejob.data.ahead import map_ahead
from vaejob.data.decode import decode_image
from vaejob.data.fingerprint import fingerprint, sample_digest
from vaejob.data.manifest import MANIFEST_KEY, Manifest, Shard, read_manifest
from vaejob.data.shards import parse_row_group
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
    images, digests = 0, 0
    for shard in manifest.shards:
        digests += _verified_shard(bucket, shard, first_id=images, manifest=manifest)
        images += shard.rows
        if on_progress is not None:
            on_progress(images, manifest.images)
    if (found := fingerprint(digests)) != manifest.fingerprint:
        raise DataError(
            f"{bucket.url}: the fingerprint of its images is {found}, the manifest says {manifest.fingerprint}"
        )
    return manifest


def shard_digests(shard: Shard, data: bytes, *, first_id: int, shape: tuple[int, int, int]) -> int:
    """The sum of the digests of a shard's samples. Raises DataError for rows that are not what the shard says."""
    footer = data[len(data) - shard.footer_size :]
    first_ids = np.cumsum([first_id] + [group.rows for group in shard.row_groups])

    def row_group_digests(index: int) -> int:
        group = shard.row_groups[index]
        body = data[group.offset : group.offset + group.size]
        ids, images = parse_row_group(shard, index, body=body, footer=footer)
        name, first = f"{shard.key} row group {index}", int(first_ids[index])
        if not np.array_equal(ids, np.arange(first, first + group.rows)):
            raise DataError(f"{name}: its ids must be {first} to {first + group.rows - 1}, one after the other")
        pixels = (_pixels(image, f"{name} image {i}", shape) for i, image in zip(ids, images, strict=True))
        return sum(sample_digest(int(i), image) for i, image in zip(ids, pixels, strict=True))

    return sum(map_ahead(row_group_digests, range(len(shard.row_groups))))


def _verified_shard(bucket: Bucket, shard: Shard, *, first_id: int, manifest: Manifest) -> int:
    name = join(bucket.url, shard.key)
    try:
        data = bucket.read(shard.key)
    except ObjectMissing:
        raise DataError(f"{name} is gone; pack the data again") from None
    if len(data) != shard.size:
        raise DataError(f"{name} has {len(data)} bytes, the manifest says {shard.size}; pack the data again")
    try:
        digests = shard_digests(shard, data, first_id=first_id, shape=manifest.shape)
    except DataError as error:
        raise DataError(f"{bucket.url}/{error}; pack the data again") from error
    if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
        raise DataError(f"{name}: sha256 is {found}, the manifest says {shard.sha256}; pack the data again")
    return digests


def _pixels(image: Any, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    if isinstance(image, bytes):
        return decode_image(image, name, shape=shape)
    if len(image) != np.prod(shape):
        raise DataError(f"{name} has {len(image)} bytes of pixels; an image of this data set has {np.prod(shape)}")
    return np.asarray(image).reshape(shape)
