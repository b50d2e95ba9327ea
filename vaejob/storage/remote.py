"""A bucket in an object store, reached by short requests that are each repeated until their deadline."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from vaejob.errors import BucketError, ObjectMissing
from vaejob.storage.bucket import LEFTOVER_S
from vaejob.storage.client import open_store, parse_place
from vaejob.storage.failures import Replaced, ShortReply, cause_of, code_of, one_line, status_of, verdict
from vaejob.storage.keys import check_span, checked, checked_folder, parent, span
from vaejob.storage.parts import end_broken_uploads
from vaejob.storage.retry import Outage, with_retries
from vaejob.storage.secrets import redact

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

Result = TypeVar("Result")

PIECE_BYTES = 16 * 2**20  # of a read, and the largest blob that is written by one request
PART_BYTES = 8 * 2**20  # of a larger write: four at once must fit a slow line within one request's time-out
MOST_PARTS = 9_000  # S3 allows 10,000
AT_ONCE = 4
CHUNK_BYTES = 2**18  # of a reply, taken over as they come; a broken attempt loses less than that
DEADLINE_S = 120.0  # for one request with all its repetitions, and for a store that fails every caller
REQUEST_S = 30.0  # for one attempt, from connecting to the last byte of the reply


class _Piece:
    """Bytes of an object as they come: an attempt goes on where the last broke off, so a slow line is not a broken one."""

    def __init__(self, tag: str | None, on_bytes: Callable[[int], None] | None) -> None:
        self.tag = tag
        self.object_bytes = 0
        self.chunks: list[bytes] = []
        self._on_bytes = on_bytes

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def take(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        if self._on_bytes is not None:
            self._on_bytes(len(chunk))

    def drop(self) -> None:
        if self._on_bytes is not None and self.chunks:
            self._on_bytes(-len(self))
        self.chunks.clear()

    def copy_into(self, view: memoryview, offset: int) -> None:
        for chunk in self.chunks:
            view[offset : offset + len(chunk)] = chunk
            offset += len(chunk)


class RemoteBucket:
    """An s3://, gs:// or az:// address; safe to share between threads, to be opened anew in another process."""

    def __init__(self, address: str, *, deadline_s: float = DEADLINE_S, request_s: float = REQUEST_S) -> None:
        self.url = address.rstrip("/")
        self._place = parse_place(self.url)
        request_s = min(request_s, deadline_s / 2)
        self._deadline_s = deadline_s - request_s  # for the last attempt to start
        self._store = open_store(self._place, request_s=request_s, retry_s=0)
        # The parts of a large write are repeated one by one, which only the client can do.
        self._parts_store = open_store(self._place, request_s=request_s, retry_s=self._deadline_s)
        self._outage = Outage()
        self._seen = False

    def read(
        self,
        key: str,
        start: int | None = None,
        stop: int | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> bytes:
        first, last = span(start, stop)
        read = partial(self._read_one_version, key, first, last, on_bytes)
        return with_retries(read, what=self._name(key), deadline_s=self._deadline_s, cause=cause_of)

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

    def versions(self, prefix: str = "") -> dict[str, str]:
        folder, first = self._place.folder + parent(prefix), self._place.folder + prefix
        found, behind = dict[str, str](), first[:-1]

        def go_on() -> None:
            """Keys come sorted: those before and behind the prefix are not asked for, nor those that have come."""
            nonlocal behind
            for page in obstore.list(self._store, folder or None, offset=behind or None, chunk_size=1000):
                for meta in page:
                    behind = meta["path"]
                    if behind.startswith(first):
                        found[behind.removeprefix(self._place.folder)] = _version(meta)
                    elif behind > first:
                        return

        self._try(prefix, go_on)
        return dict(sorted(found.items()))

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._place.folder + checked_folder(prefix)
        found = self._try(prefix, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, key: str) -> None:
        with suppress(ObjectMissing):
            self._try(key, lambda: obstore.delete(self._store, self._path(key)))

    def remove_leftovers(self, *, older_than_s: float = LEFTOVER_S) -> int:
        return end_broken_uploads(self._place, older_than_s=older_than_s)

    def _read_one_version(
        self, key: str, first: int, last: int | None, on_bytes: Callable[[int], None] | None
    ) -> bytes:
        """All pieces of one object; Replaced if another object takes its place meanwhile."""
        head = self._fetch(key, first, last, on_bytes=on_bytes)
        if head is None:
            return self._read_nothing(key, first, last)
        check_span(first, last, head.object_bytes, name=self._name(key))
        end = head.object_bytes if last is None else last
        if first + len(head) == end:
            return b"".join(head.chunks)
        whole = _zeros(end - first)
        with whole.getbuffer() as view, ThreadPoolExecutor(AT_ONCE) as pool:
            head.copy_into(view, 0)
            fetch_into = partial(self._fetch_into, view, key, first, end, head.tag, on_bytes)
            list(pool.map(fetch_into, range(len(head), end - first, PIECE_BYTES)))
        return whole.getvalue()

    def _fetch_into(
        self,
        view: memoryview,
        key: str,
        first: int,
        end: int,
        tag: str | None,
        on_bytes: Callable[[int], None] | None,
        offset: int,
    ) -> None:
        piece = self._fetch(key, first + offset, end, tag, on_bytes=on_bytes)
        if piece is None or piece.object_bytes < end:
            raise Replaced("the object became shorter while it was read")
        piece.copy_into(view, offset)

    def _fetch(
        self,
        key: str,
        first: int,
        last: int | None,
        tag: str | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> _Piece | None:
        """At most PIECE_BYTES from `first` on; None if the object has no byte there."""
        stop = first + PIECE_BYTES if last is None else min(last, first + PIECE_BYTES)
        if stop == first:
            return None
        piece = _Piece(tag, on_bytes)
        return self._try(key, lambda: self._fetch_rest(key, first, stop, piece))

    def _fetch_rest(self, key: str, first: int, stop: int, piece: _Piece) -> _Piece | None:
        """One request, for what of [first, stop) the piece does not have yet."""
        if piece.tag is None:
            piece.drop()  # nothing would tell whether the rest is of the same object
        options: GetOptions = {"range": (first + len(piece), stop)}
        if piece.tag:
            options["if_match"] = piece.tag
        try:
            reply = obstore.get(self._store, self._path(key), options=options)
        except PreconditionError as error:
            raise Replaced("the object was replaced while it was read") from error
        except Exception as error:
            if status_of(error) == 416:
                return None
            raise
        piece.tag = reply.meta["e_tag"]
        piece.object_bytes = reply.meta["size"]
        due = min(stop, piece.object_bytes) - first
        try:
            for chunk in reply.stream(CHUNK_BYTES):
                piece.take(chunk)
        except BaseError:
            if len(piece) != due:
                raise
        if (came := len(piece)) != due:
            piece.drop()  # a reply that lies about its length may lie about its bytes
            raise ShortReply(f"{came} bytes came, {due} were due")
        return piece

    def _read_nothing(self, key: str, first: int, last: int | None) -> bytes:
        size = self.size(key)
        if size is None:
            raise ObjectMissing(f"{self._name(key)}: there is no such object")
        check_span(first, last, size, name=self._name(key))
        if size > first and last != first:
            raise Replaced("the object became longer while it was read")
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

        def attempt() -> Result:
            try:
                return call()
            except Exception as error:
                redact(error)  # a request's address may be signed, and errors end up in logs
                raise

        return with_retries(
            attempt,
            what=name,
            deadline_s=self._deadline_s,
            final=final,
            explain=one_line,
            cause=cause_of,
            outage=self._outage,
        )


def _final(error: Exception, *, bucket: str, name: str) -> Exception | None:
    return error if isinstance(error, Replaced) else verdict(error, bucket=bucket, name=name)


def _version(meta: "ObjectMeta") -> str:
    tag = meta["e_tag"].replace('"', "") if meta["e_tag"] else meta["last_modified"].isoformat()
    return f"{meta['size']} {tag}"


def _zeros(size: int) -> io.BytesIO:
    """A buffer whose getvalue() hands out its memory without copying it."""
    buffer = io.BytesIO()
    buffer.seek(size - 1)
    buffer.write(b"\0")
    return buffer
