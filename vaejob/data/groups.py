"""Row groups of one data set by their number, whole or not at all: each is checked against the manifest.

Bytes come from the disk cache where there is one, else from the bucket by one ranged read. Bytes that do not match are
read again, since a byte may have been flipped on the way: what the store holds is only blamed for damage that stays.
"""

from contextlib import suppress
from functools import lru_cache

import numpy as np

from vaejob.data.cache import DiskCache
from vaejob.data.foreign import Footer, parquet_images, parse_footer
from vaejob.data.manifest import Manifest, Shard
from vaejob.data.shards import Images, check_bytes, plain_images
from vaejob.errors import BucketError, DataError
from vaejob.storage import Bucket, open_bucket, split_address
from vaejob.storage.patience import Patience
from vaejob.storage.retry import read_whole

READS_OF_DAMAGED_BYTES = 3
_FOOTERS = 1024
_FOOTERS_BYTES = 64 << 20


class RowGroups:
    """Reads row groups; safe to share between threads."""

    def __init__(
        self,
        bucket: Bucket,
        manifest: Manifest,
        table: np.ndarray,
        *,
        cache: DiskCache | None = None,
        patience: Patience | None = None,
    ) -> None:
        """patience: with a bucket that is out of reach, beyond the deadline of a request."""
        self.manifest = manifest
        self.table = table
        self.first_ids = np.concatenate([[0], np.cumsum(table["rows"], dtype=np.int64)])
        """Sample id of each row group's first row, and the number of images; shape [row groups + 1]."""
        self._bucket = shards_bucket(bucket, manifest)
        self._cache = cache
        self._patience = patience
        self._first_groups = np.cumsum([0] + [shard.row_groups for shard in manifest.shards])
        footers = _FOOTERS_BYTES // max(shard.footer_size for shard in manifest.shards)
        self._footer = lru_cache(maxsize=min(max(1, footers), _FOOTERS))(self._read_footer)

    @property
    def url(self) -> str:
        """Where the shards lie."""
        return self._bucket.url

    def name(self, group: int) -> str:
        shard, index = self._place(group)
        return f"{self._bucket.url}/{shard.key} row group {index}"

    def image_name(self, group: int, row: int) -> str:
        shard, _ = self._place(group)
        return f"{self._bucket.url}/{shard.key} image {self.first_ids[group] + row}"

    def read(self, group: int) -> Images:
        """The images of a row group. Raises DataError for bytes that stay damaged, BucketError if the bucket fails."""

        def read() -> Images:
            return read_whole(lambda: self._read(group))

        return read() if self._patience is None else self._patience.outlast(read)

    def _read(self, group: int) -> Images:
        shard, index = self._place(group)
        place, name = self.table[group], self.name(group)
        entry, size, crc32 = f"{group:08d}-{place['crc32']:08x}", int(place["size"]), int(place["crc32"])
        body = self._cache.get(entry, size=size, crc32=crc32) if self._cache is not None else None
        cached = body is not None
        if body is None:
            start = int(place["offset"])
            body = self._fetch(shard, start, start + size)
        footer = self._footer(shard) if self.manifest.layout == "parquet" else None
        images = parse_group(name, body, place, index, footer=footer, shard=shard, manifest=self.manifest)
        if self._cache is not None and not cached:
            self._cache.put(entry, body)
        return images

    def _place(self, group: int) -> tuple[Shard, int]:
        """The shard that holds a row group, and the row group's number in it."""
        shard = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return self.manifest.shards[shard], group - int(self._first_groups[shard])

    def _fetch(self, shard: Shard, start: int, stop: int) -> bytes:
        try:
            return self._bucket.read(shard.key, start, stop)
        except BucketError:
            # A store that answers, but has not what the manifest names, will not have it on another try.
            with suppress(BucketError):
                if (size := self._bucket.size(shard.key)) != shard.size:
                    found = "gone" if size is None else f"{size} bytes long"
                    raise DataError(
                        f"{self._bucket.url}/{shard.key} is {found}; the manifest says {shard.size} bytes"
                    ) from None
            raise

    def _read_footer(self, shard: Shard) -> Footer:
        entry, size, crc32 = f"footer-{shard.sha256[:32]}", shard.footer_size, shard.footer_crc32
        kept = self._cache.get(entry, size=size, crc32=crc32) if self._cache is not None else None
        data = kept if kept is not None else self._fetch(shard, shard.size - size, shard.size)
        footer = checked_footer(f"{self._bucket.url}/{shard.key}", data, shard=shard, manifest=self.manifest)
        if self._cache is not None and kept is None:
            self._cache.put(entry, data)
        return footer


def shards_bucket(bucket: Bucket, manifest: Manifest) -> Bucket:
    """Where the shards of the data set in this bucket lie."""
    match manifest.shards_at:
        case "":
            return bucket
        case "..":
            return open_bucket(split_address(bucket.url)[0])
        case address:
            return open_bucket(address)


def checked_footer(name: str, footer: bytes, *, shard: Shard, manifest: Manifest) -> Footer:
    """What these bytes at the end of a shard say, once. Raises DataError if they are not what the manifest says."""
    name = f"{name}, footer of the shard"
    check_bytes(name, footer, size=shard.footer_size, crc32=shard.footer_crc32)
    return parse_footer(name, footer, column=manifest.column)


def parse_group(
    name: str,
    body: bytes,
    place: np.void,
    index: int,
    *,
    footer: Footer | bytes | None,
    shard: Shard,
    manifest: Manifest,
) -> Images:
    """The images of a row group from its bytes. Raises DataError, with that name, if they are not what the manifest says.

    place is the row group's entry of dtype ROW_GROUP, index its number in the shard; layout parquet needs the footer,
    as bytes or, where many row groups are read, as `checked_footer` gives it.
    """
    rows = int(place["rows"])
    check_bytes(name, body, size=int(place["size"]), crc32=int(place["crc32"]))
    if manifest.layout == "plain":
        return plain_images(name, body, rows=rows, image_bytes=manifest.dims if manifest.encoding == "raw" else None)
    assert footer is not None
    if isinstance(footer, bytes):
        footer = checked_footer(name, footer, shard=shard, manifest=manifest)
    images = parquet_images(
        name,
        body,
        footer=footer,
        index=index,
        rows=rows,
        offset=int(place["offset"]),
        file_size=shard.size,
    )
    if isinstance(images, np.ndarray) and (manifest.encoding != "raw" or images.shape[1] != manifest.dims):
        raise DataError(f"{name}: its images have {images.shape[1]} bytes, by the manifest {manifest.dims}")
    return images
