"""Repeats what fails, with growing random pauses, until it succeeds, fails for good, or a deadline has passed."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from vaejob.errors import BucketError, DataDamaged, VaejobError

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
READS_OF_DAMAGED_BYTES = 3

_dice = random.SystemRandom()  # of its own, so that seeded workers do not pause in step, nor disturb their seeds
_lock = Lock()
_retries = Counter[str]()


def retries_so_far() -> Counter[str]:
    """Attempts of this process that had to be repeated, by their cause."""
    with _lock:
        return _retries.copy()


def ours(error: Exception) -> Exception | None:
    """The error itself if it is already one of ours, which no repetition mends."""
    return error if isinstance(error, VaejobError) else None


class StoreDown(BucketError):  # noqa: N818 - a state of the store
    """Every attempt has failed until the deadline, for no reason that is final."""


class Outage:
    """How long a store has failed everyone: its callers wait for it together, not one after the other."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._first_failure: float | None = None  # that no success has followed
        self._last_failure = 0.0

    def over(self) -> None:
        with self._lock:
            self._first_failure = None

    def lasts_s(self, *, attempted: float) -> float:
        """Seconds from its first failure to now, when one more attempt, begun at `attempted`, has failed."""
        with self._lock:
            now = time.monotonic()
            nobody_asked = attempted - self._last_failure > 2 * LONGEST_PAUSE_S
            if self._first_failure is None or nobody_asked:
                self._first_failure = now
            self._last_failure = now
            return now - self._first_failure


def with_retries(
    call: Callable[[], Result],
    *,
    what: str,
    deadline_s: float,
    final: Callable[[Exception], Exception | None] = ours,
    explain: Callable[[Exception], str] = str,
    cause: Callable[[Exception], str] = lambda error: type(error).__name__,
    outage: Outage | None = None,
) -> Result:
    """What the call returns; raises what `final` makes of an error that no repetition mends, else StoreDown.

    The last attempt starts at the deadline and is not interrupted, so the call must have a time-out of its own. Where an
    outage is shared, the deadline counts from its first failure; a call that begins later still makes one attempt.
    """
    outage = outage or Outage()
    started = time.monotonic()
    for attempt in itertools.count():
        attempted = time.monotonic()
        try:
            result = call()
        except Exception as error:
            if (verdict := final(error)) is not None:
                outage.over()  # the store has answered
                raise verdict from (error.__cause__ if verdict is error else error)
            waited_s = max(outage.lasts_s(attempted=attempted), time.monotonic() - started)
            if waited_s >= deadline_s:
                tried = f"gave up after {waited_s:.0f} s and {attempt + 1} attempts"
                raise StoreDown(f"{what}: {tried}: {explain(error)}") from error
            _count_retry(cause(error))
        else:
            outage.over()
            return result
        pause_s = _dice.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 16)))
        time.sleep(min(pause_s, deadline_s - waited_s))
    raise AssertionError("unreachable: the count never ends")


def read_whole(read: Callable[[], Result]) -> Result:
    """What it returns; asks again for damaged bytes, since one may have been flipped on its way here.

    Damage that stays is what the store holds: DataDamaged.
    """
    for _ in range(READS_OF_DAMAGED_BYTES - 1):
        try:
            return read()
        except DataDamaged:
            _count_retry("damaged bytes")
    return read()


def _count_retry(cause: str) -> None:
    with _lock:
        _retries[cause] += 1
