"""Counting images that several threads are done with."""

from collections.abc import Callable
from threading import Lock


def counter(on_progress: Callable[[int, int], None] | None, *, total: int) -> Callable[[int], None]:
    """Adds images from any thread, and tells on_progress(done, total) each time."""
    done, lock = 0, Lock()

    def add(images: int) -> None:
        nonlocal done
        with lock:
            done += images
            if on_progress is not None:
                on_progress(done, total)

    return add
