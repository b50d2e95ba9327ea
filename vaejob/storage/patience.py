"""Outlasts a store that is out of reach, for as long as a setting says."""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from vaejob.errors import BucketError
from vaejob.storage.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreDown

Result = TypeVar("Result")

_dice = random.SystemRandom()


class Patience:
    """Repeats whole steps of work, each with the retries and the deadline of its own requests; threads may share one."""

    def __init__(
        self,
        seconds: float,
        *,
        on_outage: Callable[[StoreDown], None] = lambda error: None,
        on_return: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """on_outage hears the first failure of an outage, on_return how many seconds it has lasted."""
        self._seconds, self._on_outage, self._on_return = seconds, on_outage, on_return
        self._lock = threading.Lock()
        self._down_since: float | None = None
        self._ended = threading.Event()

    def outlast(self, call: Callable[[], Result]) -> Result:
        """What the call returns, which must bear to be repeated. Raises what is no outage, and BucketError at the end."""
        began, failures = time.monotonic(), 0
        while True:
            try:
                result = call()
            except StoreDown as error:
                waited_s = time.monotonic() - began
                if waited_s >= self._seconds or self._ended.is_set():
                    raise BucketError(
                        f"the bucket was out of reach for {waited_s:.0f} s, checkpoint.outage_seconds is "
                        f"{self._seconds:g}: {error}"
                    ) from error
                self._went_down(error, began)
                failures += 1
            else:
                if failures:  # another's success may have come from a cache
                    self._came_back()
                return result
            pause_s = _dice.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, 16)))
            self._ended.wait(min(pause_s, self._seconds - waited_s))

    def end(self) -> None:
        """Whoever waits, now or later, is refused at once."""
        self._ended.set()

    def _went_down(self, error: StoreDown, began: float) -> None:
        with self._lock:
            if self._down_since is not None:
                return
            self._down_since = began
        self._on_outage(error)

    def _came_back(self) -> None:
        with self._lock:
            if self._down_since is None:
                return
            seconds, self._down_since = time.monotonic() - self._down_since, None
        self._on_return(seconds)
