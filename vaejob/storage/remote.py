"""A bucket in an object store, reached by short requests that are each repeated until their deadline."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import obstore
from obstore import Bytes
from obstore.exceptions import AlreadyExistsError, PreconditionError

from vaejob.errors import BucketError, ObjectMissing
from vaejob.storage.client import open_store, parse_place
from vaejob.storage.failures import code_of, one_line, status_of, verdict
from vaejob.storage.keys import check_span, checked, checked_folder, parent, span
from vaejob.storage.retry import with_retries

if TYPE_CHECKING:
    from obstore import GetOptions

Result = TypeVar("Result")

PIECE_BYTES = 16 * 2**20  # of a read, and the largest blob that is written by one request
PART_BYTES = 8 * 2**20  # of a larger write: four at once must fit a slow line within one request's time-out
MOST_PARTS = 9_000  # S3 allows 10,000
AT_ONCE = 4


class _Piece(NamedTuple):
    data: Bytes
    size: int  # of the whole object
    tag: str | None


class _ShortReply(Exception):  # noqa: N818 - never leaves this module
    """Worth asking again for the same piece."""


class _Replaced(Exception):  # noqa: N818 - never leaves this module
    """Another object has this key now: all pieces must be read again."""


class RemoteBucket:
    """An s3://, gs:// or az:// address; safe to share between threads, to be opened anew in another process."""

    def __init__(self, address: str, *, deadline_s: float = 120.0, request_s: float = 30.0) -> None:
        self.url = address.rstrip("/")
        self._place = parse_place(self.url)
        request_s = min(request_s, deadline_s / 2)
        self._deadline_s = deadline_s - request_s  # for the last attempt to start
        self._store = open_store(self._place, request_s=request_s, retry_s=0)
        # The parts of a large write are repeated one by one, which only the client can do.
        self._parts_store = open_store(self._place, request_s=request_s, retry_s=self._deadline_s)
        self._seen = False

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        first, last = span(start, stop)
        read = partial(self._read_one_version, key, first, last)
        return with_retries(read, what=self._name(key), deadline_s=self._deadline_s)

    def write(self, key: str, data: bytes) -> None:
        large = len(data) > PIECE_BYTES
        self._try(
            key,
            lambda: obstore.put(
                self._parts_store if large else self._store,
                self._path(key),
                data,
                use_multipart=large,
                chunk_size=max(PART_BYTES, -(-len(data) // MOST_PARTS)),
                max_concurrency=AT_ONCE,
            ),
        )

    def create(self, key: str, data: bytes) -> bool:
        """As every bucket's; the data should name its writer, since equal data found after a lost reply is ours."""
        lost_replies = 0

        def attempt() -> bool:
            nonlocal lost_replies
            try:
                obstore.put(self._store, self._path(key), data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                if code_of(error) == "ConditionalRequestConflict":  # two at once, and none of them was done
                    raise
                return lost_replies > 0 and self.read(key) == data
            except Exception:
                lost_replies += 1
                raise
            return True

        return self._try(key, attempt)

    def size(self, key: str) -> int | None:
        try:
            return self._try(key, lambda: obstore.head(self._store, self._path(key))["size"])
        except ObjectMissing:
            self._check_that_bucket_exists()
            return None

    def keys(self, prefix: str = "") -> list[str]:
        folder = self._place.folder + parent(prefix)
        found = self._try(prefix, lambda: obstore.list(self._store, folder or None).collect())
        keys = (meta["path"].removeprefix(self._place.folder) for meta in found)
        return sorted(key for key in keys if key.startswith(prefix))

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._place.folder + checked_folder(prefix)
        found = self._try(prefix, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, key: str) -> None:
        with suppress(ObjectMissing):
            self._try(key, lambda: obstore.delete(self._store, self._path(key)))

    def _read_one_version(self, key: str, first: int, last: int | None) -> bytes:
        """All pieces of one object; _Replaced if another object takes its place meanwhile."""
        head = self._try(key, lambda: self._fetch(key, first, last))
        if head is None:
            return self._read_nothing(key, first, last)
        check_span(first, last, head.size, name=self._name(key))
        end = head.size if last is None else last
        if first + len(head.data) == end:
            return bytes(head.data)
        whole = _zeros(end - first)
        with whole.getbuffer() as view, ThreadPoolExecutor(AT_ONCE) as pool:
            view[: len(head.data)] = head.data
            fetch_into = partial(self._fetch_into, view, key, first, end, head.tag)
            list(pool.map(fetch_into, range(len(head.data), end - first, PIECE_BYTES)))
        return whole.getvalue()

    def _fetch_into(self, view: memoryview, key: str, first: int, end: int, tag: str | None, offset: int) -> None:
        piece = self._try(key, lambda: self._fetch(key, first + offset, end, tag))
        if piece is None or piece.size < end:
            raise _Replaced("the object became shorter while it was read")
        view[offset : offset + len(piece.data)] = piece.data

    def _fetch(self, key: str, first: int, last: int | None, tag: str | None = None) -> _Piece | None:
        """One request: at most PIECE_BYTES from `first` on; None if the object has no byte there."""
        stop = first + PIECE_BYTES if last is None else min(last, first + PIECE_BYTES)
        if stop == first:
            return None
        options: GetOptions = {"range": (first, stop)}
        if tag:
            options["if_match"] = tag
        try:
            reply = obstore.get(self._store, self._path(key), options=options)
        except PreconditionError as error:
            raise _Replaced("the object was replaced while it was read") from error
        except Exception as error:
            if status_of(error) == 416:
                return None
            raise
        piece = _Piece(reply.bytes(), reply.meta["size"], reply.meta["e_tag"])
        due = min(stop, piece.size) - first
        if len(piece.data) != due:
            raise _ShortReply(f"{len(piece.data)} bytes came, {due} were due")
        return piece

    def _read_nothing(self, key: str, first: int, last: int | None) -> bytes:
        size = self.size(key)
        if size is None:
            raise ObjectMissing(f"{self._name(key)}: there is no such object")
        check_span(first, last, size, name=self._name(key))
        if size > first and last != first:
            raise _Replaced("the object became longer while it was read")
        return b""

    def _check_that_bucket_exists(self) -> None:
        """A HEAD request answers 404 without saying whether the object or the bucket is missing; asked once."""
        if not self._seen:
            try:
                self.folders()
            except BucketError as error:
                if "access denied" not in str(error):  # one may be allowed to read but not to list
                    raise
            self._seen = True

    def _path(self, key: str) -> str:
        return self._place.folder + checked(key, url=self.url)

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _try(self, key: str, call: Callable[[], Result]) -> Result:
        name = self._name(key)
        final = partial(_final, bucket=self._place.address, name=name)
        return with_retries(call, what=name, deadline_s=self._deadline_s, final=final, explain=one_line)


def _final(error: Exception, *, bucket: str, name: str) -> Exception | None:
    return error if isinstance(error, _Replaced) else verdict(error, bucket=bucket, name=name)


def _zeros(size: int) -> io.BytesIO:
    """A buffer whose getvalue() hands out its memory without copying it."""
    buffer = io.BytesIO()
    buffer.seek(size - 1)
    buffer.write(b"\0")
    return buffer
