"""What a key may look like, and what a listing of keys means: the same for every bucket."""

from collections.abc import Iterable

from vaejob.errors import BucketError


def checked(key: str, *, url: str) -> str:
    """The key itself; BucketError if it could name something outside its bucket."""
    if any(part in ("", ".", "..") for part in key.split("/")) or any(char < " " for char in key):
        raise BucketError(
            f"{url}: {key!r} is no key; it must be names with '/' between them, none of them empty, '.' or '..'"
        )
    return key


def parent(prefix: str) -> str:
    """The folder, '' or ending with '/', that holds every key with this prefix."""
    return checked_folder(prefix[: prefix.rfind("/") + 1])


def checked_folder(prefix: str) -> str:
    """The folder's prefix itself; BucketError if it is no folder or leads outside the bucket."""
    if prefix and (not prefix.endswith("/") or prefix != checked(prefix[:-1], url=prefix) + "/"):
        raise BucketError(f"{prefix!r} is no folder; its name must end with '/'")
    return prefix


def folders_among(keys: Iterable[str], prefix: str) -> list[str]:
    """Names one level below the folder `prefix` that hold at least one of the keys, sorted."""
    below = (key[len(prefix) :] for key in keys if key.startswith(prefix))
    return sorted({rest.split("/", 1)[0] for rest in below if "/" in rest})


def spanned(data: bytes, start: int | None, stop: int | None, *, name: str) -> bytes:
    """Bytes [start, stop) of a whole blob; BucketError if it is shorter."""
    check_span(start, stop, len(data), name=name)
    return data if start is None and stop is None else data[start:stop]


def check_span(start: int | None, stop: int | None, size: int, *, name: str) -> None:
    first, last = span(start, stop)
    if max(first, last or 0) > size:
        raise BucketError(f"{name} has {size} bytes; {max(first, last or 0)} were expected")


def span(start: int | None, stop: int | None) -> tuple[int, int | None]:
    """The range that read(key, start, stop) asks for; None for the end of the blob."""
    first = start or 0
    assert 0 <= first <= (first if stop is None else stop), (start, stop)
    return first, stop
