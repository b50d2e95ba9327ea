"""Repeats what fails, with growing random pauses, until it succeeds, fails for good, or a deadline has passed."""

import itertools
import random
import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from vaejob.errors import BucketError, VaejobError

Result = TypeVar("Result")

_dice = random.SystemRandom()  # of its own, so that seeded workers do not pause in step, nor disturb their seeds
_lock = Lock()
_retries = 0


def retries_so_far() -> int:
    """Attempts of this process that had to be repeated."""
    return _retries


def ours(error: Exception) -> Exception | None:
    """The error itself if it is already one of ours, which no repetition mends."""
    return error if isinstance(error, VaejobError) else None


def with_retries(
    call: Callable[[], Result],
    *,
    what: str,
    deadline_s: float,
    final: Callable[[Exception], Exception | None] = ours,
    explain: Callable[[Exception], str] = str,
    first_pause_s: float = 0.1,
    longest_pause_s: float = 5.0,
) -> Result:
    """What the call returns; raises what `final` makes of an error that no repetition mends, else BucketError.

    The last attempt starts at the deadline and is not interrupted, so the call must have a time-out of its own.
    """
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if (verdict := final(error)) is not None:
                raise verdict from (error.__cause__ if verdict is error else error)
            spent_s = time.monotonic() - started
            if spent_s >= deadline_s:
                tried = f"gave up after {spent_s:.0f} s and {attempt + 1} attempts"
                raise BucketError(f"{what}: {tried}: {explain(error)}") from error
        _count_retry()
        pause_s = _dice.uniform(0, min(longest_pause_s, first_pause_s * 2 ** min(attempt, 16)))
        time.sleep(min(pause_s, deadline_s - spent_s))
    raise AssertionError("unreachable: the count never ends")


def _count_retry() -> None:
    global _retries
    with _lock:
        _retries += 1
