"""Where bytes live: named blobs behind a few verbs, the same for a folder, memory and an object store."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from vaejob.errors import BucketError

LEFTOVER_S = 86_400.0
"""No writer needs so long for one blob."""


class NotOffered(BucketError):  # noqa: N818 - a state of the store
    """The store, or its settings here, has no such request."""


@runtime_checkable
class Bucket(Protocol):
    """Named blobs below one address. A write is all or nothing: readers never see half a blob.

    Keys are relative, with '/' between their parts. Every verb raises BucketError, naming the address, when the store
    does not exist, refuses, or has not answered within its deadline.
    """

    url: str

    def read(
        self,
        key: str,
        start: int | None = None,
        stop: int | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> bytes:
        """The blob, or its bytes [start, stop); ObjectMissing if there is none, BucketError if it is shorter.

        on_bytes: hears from any thread how many more have come; fewer than none where some have to come again.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Puts the blob, replacing what the key held."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Puts the blob only if the key holds none; False, and nothing written, if it does.

        Raises NotOffered where a store has no conditional writes; one that pretends to have them returns True always.
        """
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the blob; None if there is none."""
        ...

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with the prefix, sorted."""
        ...

    def versions(self, prefix: str = "") -> dict[str, str]:
        """As `keys`, each with its blob's size in bytes and, after a space, what else changes when the blob does.

        One listing tells them all. A blob that is gone before its turn comes is left out.
        """
        ...

    def folders(self, prefix: str = "") -> list[str]:
        """Names one level below the folder `prefix` that hold keys, sorted; prefix is empty or ends with '/'."""
        ...

    def delete(self, key: str) -> None:
        """Removes the blob; a key that holds none is no error."""
        ...

    def remove_leftovers(self, *, older_than_s: float = LEFTOVER_S) -> int:
        """Removes what killed writers have left and no listing shows, as far as the store lets it; how many."""
        ...
