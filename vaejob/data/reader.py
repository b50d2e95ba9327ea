"""Images by sample id, from row groups that a few threads fetch ahead of their use.

Everything that is read is checked against the manifest. At most `groups_held` row groups and `prefetch` batches are in
memory; nothing is shared with other processes, and nothing is left behind when the process dies.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from vaejob.data.decode import decode_image
from vaejob.data.manifest import Manifest, Shard
from vaejob.data.shards import RowGroupColumns, parse_row_group
from vaejob.errors import BucketError, DataError
from vaejob.storage import Bucket

Tag = TypeVar("Tag")

FETCH_THREADS = 8
DECODE_THREADS = 2
READS_OF_DAMAGED_BYTES = 3


class RowGroupReader:
    """Rows of one data set by their id."""

    def __init__(self, bucket: Bucket, manifest: Manifest, *, groups_held: int) -> None:
        self._bucket = bucket
        self._manifest = manifest
        self._groups_held = groups_held
        self._places = [(shard, index) for shard in manifest.shards for index in range(len(shard.row_groups))]
        self._first_ids = np.concatenate([[0], np.cumsum(manifest.row_group_rows())])
        self._held = OrderedDict[int, Future[RowGroupColumns]]()  # newest use last
        self._footer = lru_cache(maxsize=1024)(self._read_footer)

    def batches(self, plan: Iterable[tuple[Tag, np.ndarray]], *, prefetch: int) -> Iterator[tuple[Tag, np.ndarray]]:
        """For each (tag, ids) of the plan, in its order: the tag and the images, uint8 [len(ids), C, H, W].

        Raises DataError, naming shard and row group, for bytes that do not match the manifest or do not decode, and
        BucketError when the bucket does not answer.
        """
        fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        decoders = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        ahead = deque[tuple[Tag, Future[np.ndarray]]]()
        try:
            for tag, ids in plan:
                groups = np.searchsorted(self._first_ids, ids, side="right") - 1
                fetched = {int(group): self._fetch_ahead(int(group), fetchers) for group in np.unique(groups)}
                ahead.append((tag, decoders.submit(self._gather, ids, groups, fetched)))
                if len(ahead) > prefetch:
                    tag, images = ahead.popleft()
                    yield tag, images.result()
            for tag, images in ahead:
                yield tag, images.result()
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            fetchers.shutdown(wait=False, cancel_futures=True)
            self._held.clear()  # its futures may have been cancelled

    def _fetch_ahead(self, group: int, fetchers: ThreadPoolExecutor) -> Future[RowGroupColumns]:
        if group not in self._held:
            self._held[group] = fetchers.submit(self._read_group, group)
        self._held.move_to_end(group)
        while len(self._held) > self._groups_held:
            self._held.popitem(last=False)
        return self._held[group]

    def _gather(self, ids: np.ndarray, groups: np.ndarray, fetched: dict[int, Future[RowGroupColumns]]) -> np.ndarray:
        shape = self._manifest.shape
        images = np.empty((len(ids), *shape), dtype=np.uint8)
        flat = images.reshape(len(ids), self._manifest.dims)
        rows = ids - self._first_ids[groups]
        by_group = np.argsort(groups, kind="stable")
        starts, ends = (np.searchsorted(groups[by_group], list(fetched), side=side) for side in ("left", "right"))
        for (group, future), start, end in zip(fetched.items(), starts, ends, strict=True):
            columns, chosen = future.result(), by_group[start:end]
            if isinstance(columns.images, np.ndarray):
                flat[chosen] = columns.images[rows[chosen]]
            else:
                for place, row in zip(chosen, rows[chosen], strict=True):
                    key = f"{self._bucket.url}/{self._places[group][0].key} image {self._first_ids[group] + row}"
                    images[place] = decode_image(columns.images[row], key, shape=shape)
        return images

    def _read_group(self, group: int) -> RowGroupColumns:
        shard, index = self._places[group]
        place = shard.row_groups[index]
        for attempt in range(READS_OF_DAMAGED_BYTES):
            try:
                body = self._bucket.read(shard.key, place.offset, place.offset + place.size)
                columns = parse_row_group(shard, index, body=body, footer=self._footer(shard))
            except BucketError:
                self._refuse_damaged(shard)
                raise
            except DataError as error:
                # A byte may have been flipped on the way: what the store holds is read again before it is blamed.
                self._footer.cache_clear()
                if attempt == READS_OF_DAMAGED_BYTES - 1:
                    raise DataError(f"{self._bucket.url}/{error}") from None
                continue
            first = int(self._first_ids[group])
            if not np.array_equal(columns.ids, np.arange(first, first + place.rows)):
                raise DataError(f"{self._bucket.url}/{shard.key} row group {index}: its ids do not start at {first}")
            if isinstance(columns.images, np.ndarray) and columns.images.shape[1] != self._manifest.dims:
                found = f"its images have {columns.images.shape[1]} bytes, by the manifest {self._manifest.dims}"
                raise DataError(f"{self._bucket.url}/{shard.key} row group {index}: {found}")
            return columns
        raise AssertionError("unreachable")

    def _refuse_damaged(self, shard: Shard) -> None:
        """A store that answers, but has not what the manifest names, will not have it on another try."""
        if (size := self._bucket.size(shard.key)) != shard.size:
            found = "gone" if size is None else f"{size} bytes long"
            raise DataError(
                f"{self._bucket.url}/{shard.key} is {found}; the manifest says {shard.size} bytes"
            ) from None

    def _read_footer(self, shard: Shard) -> bytes:
        return self._bucket.read(shard.key, shard.size - shard.footer_size, shard.size)
