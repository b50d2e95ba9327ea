"""Images by sample id, from row groups that threads fetch and decode ahead of their use.

plan --ids of a batch--> row groups, fetched --bytes--> decode --pixels--> batch --queue--> the training thread

The training thread only takes. At most `groups_held` + GROUPS_AHEAD row groups and prefetch + 4 batches are in memory;
nothing is shared with other processes, and nothing is left behind when the process dies.
"""

import os
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from vaejob.data.ahead import in_background
from vaejob.data.decode import decode_into, describe_shape
from vaejob.data.groups import RowGroups
from vaejob.data.shards import Images
from vaejob.errors import DataError

Tag = TypeVar("Tag")

FETCH_THREADS = 8
GROUPS_AHEAD = 16
"""Row groups that are fetched before the first batch that needs them is put together: what hides a store's latency."""

BATCHES_PLANNED = 64
BATCHES_IN_DECODING = 2
IMAGES_PER_TASK = 16
SMALL_IMAGE_BYTES = 3 * 64 * 64
"""Up to here the reading thread decodes by itself: more threads would mostly hand the interpreter's lock to one another."""


class Read(NamedTuple, Generic[Tag]):
    """The images of one entry of a plan."""

    tag: Tag
    ids: np.ndarray
    """int64 [b], ascending; without those that were skipped."""
    images: np.ndarray
    """uint8 [b, C, H, W]; in memory the channels of a pixel lie together where the images were encoded."""
    skipped: tuple[str, ...]
    """One line for each row group or image that was damaged and left out."""


class RowGroupReader:
    """Rows of one data set by their id. With skip_damaged, what stays damaged is left out and named, else it raises."""

    def __init__(
        self, groups: RowGroups, *, groups_held: int, skip_damaged: bool = False, processes_here: int = 1
    ) -> None:
        """processes_here: that read on this machine at the same time, and share its cores for decoding."""
        self._groups = groups
        self._decoders = max(1, _cores() // processes_here)
        self._groups_held = groups_held
        self._skip_damaged = skip_damaged
        self._raw = groups.manifest.encoding == "raw"
        self._small = groups.manifest.dims <= SMALL_IMAGE_BYTES

    def batches(self, plan: Iterable[tuple[Tag, np.ndarray]], *, prefetch: int) -> Generator[Read[Tag], None, None]:
        """The images of each (tag, ids) of the plan, in its order; ids ascend within each.

        Raises DataError, naming shard and row group, for bytes that do not match the manifest or do not decode, and
        BucketError when the bucket does not answer.
        """
        return in_background(self._read(plan), depth=max(1, prefetch))

    def _read(self, plan: Iterable[tuple[Tag, np.ndarray]]) -> Generator[Read[Tag], None, None]:
        """Fetches far ahead, decodes a little ahead; gives a batch as soon as it is whole."""
        decoding = deque[_Assembling[Tag]]()
        fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        decoders = ThreadPoolExecutor(self._decoders, thread_name_prefix="decode")
        try:
            with closing(self._fetched_ahead(plan, fetchers)) as planned:
                for batch in planned:
                    while decoding and (len(decoding) >= BATCHES_IN_DECODING or not batch.is_fetched()):
                        yield decoding.popleft().finish()
                    assembling = self._assemble(batch, decoders)
                    if assembling.tasks:
                        decoding.append(assembling)
                    else:
                        yield from (earlier.finish() for earlier in (*decoding, assembling))
                        decoding.clear()
            while decoding:
                yield decoding.popleft().finish()
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            fetchers.shutdown(wait=False, cancel_futures=True)

    def _fetched_ahead(
        self, plan: Iterable[tuple[Tag, np.ndarray]], fetchers: ThreadPoolExecutor
    ) -> Generator["_Planned[Tag]", None, None]:
        """The plan's batches with their row groups, of which up to GROUPS_AHEAD that no earlier batch needs are on their way."""
        held = OrderedDict[int, _Held]()  # newest use last
        ahead = deque[_Planned[Tag]]()
        new_groups = 0
        for tag, ids in plan:
            batch = self._planned(tag, ids)
            for group in batch.groups:
                if group not in held:
                    held[group] = _Held(fetchers.submit(self._groups.read, group))
                    batch.new_groups += 1
                held.move_to_end(group)
                batch.held.append(held[group])
            ahead.append(batch)
            new_groups += batch.new_groups
            while len(held) > self._groups_held + GROUPS_AHEAD:
                held.popitem(last=False)
            while ahead and (new_groups - ahead[0].new_groups >= GROUPS_AHEAD or len(ahead) > BATCHES_PLANNED):
                new_groups -= ahead[0].new_groups
                yield ahead.popleft()
        yield from ahead

    def _planned(self, tag: Tag, ids: np.ndarray) -> "_Planned[Tag]":
        groups = np.searchsorted(self._groups.first_ids, ids, side="right") - 1
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        rows = ids - self._groups.first_ids[groups]
        return _Planned(tag, ids, rows, groups[starts].tolist(), [*starts.tolist(), len(ids)])

    def _assemble(self, batch: "_Planned[Tag]", decoders: ThreadPoolExecutor) -> "_Assembling[Tag]":
        channels, height, width = self._groups.manifest.shape
        shape = (channels, height, width) if self._raw else (height, width, channels)
        try:
            pixels = np.empty((len(batch.ids), *shape), dtype=np.uint8)
        except MemoryError:
            what = f"{len(batch.ids)} images of {describe_shape(self._groups.manifest.shape)}"
            raise DataError(f"{self._groups.url}: there is no memory for a batch of {what}") from None
        work = _Assembling(batch, pixels if self._raw else pixels.transpose(0, 3, 1, 2))
        flat = pixels.reshape(len(pixels), self._groups.manifest.dims) if self._raw else pixels
        for group, held, start, end in zip(batch.groups, batch.held, batch.starts, batch.starts[1:], strict=False):
            try:
                images = held.wait() if held.images is None else held.images
            except DataError as error:
                work.leave_out(range(start, end), self._refused(error))
                continue
            rows = batch.rows[start:end]
            if isinstance(images, np.ndarray):
                images.take(rows, 0, flat[start:end], "clip")  # rows are in range: no second copy
                continue
            if self._small:
                work.leave_out_damaged(start, self._decode(group, images, rows.tolist(), pixels[start:]))
                continue
            for first in range(0, len(rows), IMAGES_PER_TASK):
                some = rows[first : first + IMAGES_PER_TASK].tolist()
                task = decoders.submit(self._decode, group, images, some, pixels[start + first :])
                work.tasks.append((start + first, task))
        return work

    def _decode(self, group: int, images: list[memoryview], rows: list[int], pixels: np.ndarray) -> dict[int, str]:
        """Decodes these rows into the first pixels; the damaged ones, by their place, with what is wrong."""
        damaged = {}
        for place, row in enumerate(rows):
            try:
                try:
                    decode_into(images[row], "", pixels[place])
                except DataError:  # once more, with its name: making all names would take longer than a small image
                    decode_into(images[row], self._groups.image_name(group, row), pixels[place])
            except DataError as error:
                damaged[place] = self._refused(error)
        return damaged

    def _refused(self, error: DataError) -> str:
        if not self._skip_damaged:
            raise error
        return str(error)


class _Held:
    """A row group that is in memory, or on its way."""

    __slots__ = ("_fetched", "images")

    def __init__(self, fetched: Future[Images]) -> None:
        self._fetched = fetched
        self.images: Images | None = None

    def is_fetched(self) -> bool:
        return self.images is not None or self._fetched.done()

    def wait(self) -> Images:
        """Raises what reading it raised, to everyone who asks."""
        self.images = self._fetched.result()
        return self.images


@dataclass
class _Planned(Generic[Tag]):
    """A batch whose row groups are on their way."""

    tag: Tag
    ids: np.ndarray
    rows: np.ndarray
    """Of each id, in its row group."""
    groups: list[int]
    starts: list[int]
    """Where in the ids the rows of each row group begin, and their end."""
    held: list[_Held] = field(default_factory=list)
    new_groups: int = 0

    def is_fetched(self) -> bool:
        return all(held.is_fetched() for held in self.held)


@dataclass
class _Assembling(Generic[Tag]):
    """A batch whose images are being decoded."""

    batch: _Planned[Tag]
    images: np.ndarray
    tasks: list[tuple[int, Future[dict[int, str]]]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def leave_out(self, places: Iterable[int], why: str) -> None:
        self.damaged += places
        self.skipped.append(why)

    def leave_out_damaged(self, start: int, damaged: dict[int, str]) -> None:
        """Those images of a task that begins at this place, as `_decode` tells them."""
        for place, why in damaged.items():
            self.leave_out([start + place], why)

    def finish(self) -> Read[Tag]:
        for start, task in self.tasks:
            self.leave_out_damaged(start, task.result())
        ids, images = self.batch.ids, self.images
        if self.damaged:
            whole = np.setdiff1d(np.arange(len(ids)), self.damaged)
            ids, images = ids[whole], images[whole]
        return Read(self.batch.tag, ids, images, tuple(self.skipped))


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
