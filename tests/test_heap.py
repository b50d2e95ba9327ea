"""A job on a CPU keeps the memory that its steps free, until it ends; no page is asked of the kernel twice."""

import os
import platform
import resource
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from vaejob.cluster.driver import environment
from vaejob.config import ClusterConfig
from vaejob.training import heap

PAGES = """
import ctypes, resource, sys
from concurrent.futures import ThreadPoolExecutor
import psutil, torch
from vaejob.training.heap import freed_memory_kept

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: some machines hand out 2 MB at once
torch.set_num_threads(1)
cpu, large = torch.device("cpu"), int(sys.argv[1]) << 20

def step():
    return [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(30)] + [torch.ones(large, dtype=torch.uint8) for _ in range(3)]

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


class Pages(NamedTuple):
    """That the kernel handed out at each step, and what came of the memory."""

    usual: int
    usual_in_a_thread: int
    kept: int
    kept_in_a_thread: int
    given_back_mb: int
    afterwards: int


def pages(*, large_mb: int, **variables: str) -> tuple[Pages, int]:
    """And how many a step writes: 30 tensors of 4 MB and 3 large ones."""
    done = subprocess.run(
        [sys.executable, "-c", PAGES, str(large_mb)],
        capture_output=True, text=True, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Pages(*map(int, done.stdout.split())), (120 + 3 * large_mb << 20) // resource.getpagesize()


of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator alone")


@of_glibc
def test_freed_memory_is_used_again_until_the_job_ends() -> None:
    found, written = pages(large_mb=40)
    assert min(found.usual, found.usual_in_a_thread) > written / 3
    assert max(found.kept, found.kept_in_a_thread) < written / 30
    assert found.afterwards > written / 12
    assert found.given_back_mb > 100


@of_glibc
def test_ray_gives_its_threads_no_memory_of_their_own_which_could_not_keep_large_tensors() -> None:
    found, written = pages(large_mb=100)
    assert found.kept_in_a_thread > written / 3
    found, written = pages(large_mb=100, **environment(ClusterConfig()))
    assert found.kept_in_a_thread < written / 30
    assert environment(ClusterConfig(gpus_per_worker=1)) == {}


def test_it_is_of_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_tell", lambda options: pytest.fail(f"told {options}"))
    with heap.freed_memory_kept(torch.device("cuda")):
        assert not heap._open
