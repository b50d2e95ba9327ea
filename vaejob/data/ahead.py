"""Work done by threads ahead of its use, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8
"""Enough to hide the latency of a bucket; decoding uses as many as there are cores."""


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like map, with a few items in work while the caller uses those before them."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque[Future[Result]]()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
