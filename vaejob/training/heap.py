"""What becomes of the memory that a step on a CPU has freed: it stays with the process, for the next step takes as much again.

glibc gives most of it back to the kernel, which hands it out anew page by page, each filled with zeros. How often depends on
what happens to lie behind it: 13,000 to 83,000 pages in a step of the same ladder, which took 345 to 470 ms, and 320 without.
"""

import ctypes
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # as mallopt(3) numbers them
HEAP_OF_A_THREAD = 64 << 20  # glibc gives an empty one back unless that much is to lie behind the last block

KEEPING = {TRIM_THRESHOLD: -1, MMAP_MAX: 0, TOP_PAD: HEAP_OF_A_THREAD}
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536, TOP_PAD: 128 << 10}
"""Where glibc comes to by itself in a process that frees large blocks; once told, it does not move any more."""

_lock = threading.Lock()
_open = 0


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """While it is open in any thread, where the device is a CPU and the allocator is glibc's; then what is free is given back."""
    global _open
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    with _lock:
        if not _open:
            _tell(KEEPING)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                _tell(USUAL)
                ctypes.CDLL(None).malloc_trim(0)


def _tell(options: Mapping[int, int]) -> None:
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
