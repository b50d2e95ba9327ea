"""Counting images, or bytes, that several threads are done with."""

from collections.abc import Callable
from threading import Lock


def counter(on_progress: Callable[[int, int], None] | None, *, total: int) -> Callable[[int], None]:
    """Adds images or bytes from any thread, and tells on_progress(done, total) each time."""
    done, lock = 0, Lock()

    def add(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if on_progress is not None:
                on_progress(done, total)

    return add
