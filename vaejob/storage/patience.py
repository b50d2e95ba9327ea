"""Outlasts a store that is out of reach, for as long as a setting says."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from vaejob.errors import BucketError
from vaejob.storage.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreDown

Result = TypeVar("Result")

_dice = random.SystemRandom()


class Patience:
    """Repeats whole steps of work, each with the retries and the deadline of its own requests."""

    def __init__(
        self,
        seconds: float,
        *,
        on_outage: Callable[[StoreDown], None] = lambda error: None,
        on_return: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """on_outage hears the first failure of an outage, on_return how many seconds it has lasted."""
        self._seconds, self._on_outage, self._on_return = seconds, on_outage, on_return

    def outlast(self, call: Callable[[], Result]) -> Result:
        """What the call returns, which must bear to be repeated. Raises what is no outage, and BucketError at the end."""
        began, failures = time.monotonic(), 0
        while True:
            try:
                result = call()
            except StoreDown as error:
                waited_s = time.monotonic() - began
                if waited_s >= self._seconds:
                    raise BucketError(
                        f"the bucket was out of reach for {waited_s:.0f} s, checkpoint.outage_seconds is "
                        f"{self._seconds:g}: {error}"
                    ) from error
                if not failures:
                    self._on_outage(error)
                failures += 1
            else:
                if failures:
                    self._on_return(time.monotonic() - began)
                return result
            pause_s = _dice.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, 16)))
            time.sleep(min(pause_s, self._seconds - waited_s))
