"""The last few of what is costly to make, shared by the threads of this process."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Recent(Generic[Key, Made]):
    """Keeps what was asked for last. Each is made once, however many threads ask for it at the same time."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._made: dict[Key, Future[Made]] = {}  # the newest last

    def get(self, key: Key, make: Callable[[], Made]) -> Made:
        with self._lock:
            known = self._made.pop(key, None)
            future = known or Future()
            self._made[key] = future
            if len(self._made) > self._most:
                del self._made[next(iter(self._made))]
        if known is None:
            try:
                future.set_result(make())
            except BaseException as error:
                self._forget(key, future)
                future.set_exception(error)
        return future.result()

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._made

    def _forget(self, key: Key, future: Future[Made]) -> None:
        with self._lock:
            if self._made.get(key) is future:
                del self._made[key]
