"""Work done by threads ahead of its use, in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8
"""Enough to hide the latency of a bucket; decoding uses as many as there are cores."""


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = THREADS) -> Iterator[Result]:
    """Like map, with a few items in work while the caller uses those before them."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[Future[Result]]()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_background(items: Generator[Item, None, None], *, depth: int) -> Generator[Item, None, None]:
    """The same items, made by a thread of their own at most `depth` ahead; so is the exception that ends them.

    The thread is woken when half of them are taken: waking it costs the taker more than to take, on a virtual machine most.
    Closed, it tells the thread, which ends after the item that it is at.
    """
    made, some = SimpleQueue[Item | _Ended](), max(1, depth // 2)
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        ended = _Ended(None)
        try:
            for item in items:
                room.acquire()
                if closed.is_set():
                    break
                made.put(item)
        except BaseException as error:
            ended = _Ended(error)
        finally:
            items.close()
        made.put(ended)

    threading.Thread(target=work, name="read-ahead", daemon=True).start()
    try:
        taken = 0
        while not isinstance(item := made.get(), _Ended):
            taken += 1
            if taken % some == 0:
                room.release(some)
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        room.release()


class _Ended(NamedTuple):
    """Behind the last item."""

    error: BaseException | None
