"""A job on a CPU keeps the memory that its steps free, until it ends; no page is asked of the kernel twice."""

import platform
import resource
import subprocess
import sys

import pytest
import torch

from vaejob.training import heap

PAGES = """
import ctypes, resource
from concurrent.futures import ThreadPoolExecutor
import psutil, torch
from vaejob.training.heap import freed_memory_kept

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: some machines hand out 2 MB at once
torch.set_num_threads(1)
cpu = torch.device("cpu")

def step():
    "240 MB, in pieces of a heap and in larger ones."
    return [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(30)] + [torch.ones(40 << 20, dtype=torch.uint8) for _ in range(3)]

def pages_of_a_step():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5

def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(pages_of_a_step).result()

def resident_mb():
    return psutil.Process().memory_info().rss >> 20

usual = pages_of_a_step(), in_a_thread()
with freed_memory_kept(cpu):
    with freed_memory_kept(cpu):
        pass
    kept = pages_of_a_step(), in_a_thread()
    held = resident_mb()
print(*usual, *kept, held - resident_mb(), pages_of_a_step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator alone")
def test_freed_memory_is_used_again_until_the_job_ends() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usual, usual_in_a_thread, kept, kept_in_a_thread, given_back_mb, afterwards = map(int, done.stdout.split())
    written = (240 << 20) // resource.getpagesize()
    assert min(usual, usual_in_a_thread) > written / 3
    assert max(kept, kept_in_a_thread) < written / 30
    assert afterwards > written / 12
    assert given_back_mb > 100


def test_it_is_of_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_tell", lambda options: pytest.fail(f"told {options}"))
    with heap.freed_memory_kept(torch.device("cuda")):
        assert not heap._open
