"""What one fresh process does, and what it says about it in one line of JSON."""

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from tests.benchmarks.peers.loader import Loader, Reading, loader_of
from tests.benchmarks.peers.pictures import Case, Pictures, make_pictures, pixel_hashes
from tests.benchmarks.peers.processes import READY

ANSWERS = 9
"""The file descriptor that answers go to."""
Work = Literal["make", "write", "list", "epoch", "first batch", "fetch", "decode"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """make: the pictures. write: a loader's format. list: which images come. The others are timed."""

    work: Work
    loader: str
    pictures: str
    """Folder of the case's images."""
    reading: Reading
    grown_from: str | None = None
    until: int | None = None
    """list: images after which to stop."""
    output: str = ""
    """list: the file for the hashes. write: the folder for the shards."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Task":
        fields = json.loads(text)
        reading = fields.pop("reading")
        return Task(**fields, reading=Reading(**{**reading, "case": Case(**reading["case"])}))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass, as a process saw it: from the call that makes the loader until its last batch is there."""

    images: int
    wall_seconds: float
    cpu_seconds: float
    """Of the process and all its children, their end included."""
    first_batch_seconds: float
    peak_rss_mb: float
    """Of the process, and its largest child once for each worker; pages that they share count in each."""

    def beside(self, other: "Measured") -> "Measured":
        """Of two ranks that ran at the same time."""
        return Measured(
            images=self.images + other.images,
            wall_seconds=max(self.wall_seconds, other.wall_seconds),
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            first_batch_seconds=max(self.first_batch_seconds, other.first_batch_seconds),
            peak_rss_mb=self.peak_rss_mb + other.peak_rss_mb,
        )


def run_task(task: Task) -> dict[str, Any]:
    case, folder = task.reading.case, Path(task.pictures)
    match task.work:
        case "make":
            make_pictures(case, folder, grown_from=task.grown_from)
        case "write":
            loader_of(task.loader).write(Pictures(case, folder), Path(task.output))
        case "list":
            np.save(task.output, listed(loader_of(task.loader), task.reading, until=task.until or case.images))
        case "epoch" | "first batch":
            loader = loader_of(task.loader)
            return asdict(timed_pass(loader, task.reading, first_only=task.work == "first batch"))
        case "fetch":
            from tests.benchmarks.peers.ceilings import fetch

            return asdict(timed_work(lambda: fetch(task.reading.address), images=case.images))
        case "decode":
            from tests.benchmarks.peers.ceilings import decode

            stored = list(Pictures(case, folder))
            return asdict(timed_work(lambda: decode(case, stored), images=case.images))
    return {}


def listed(loader: Loader, reading: Reading, *, until: int) -> np.ndarray:
    """Hashes of the images in the order in which they come, from reading.images_seen until there are `until`."""
    hashes, images_seen = [np.empty(0, np.uint64)], reading.images_seen
    batches = loader.batches(reading)
    for batch in batches:
        if batch.dtype != torch.uint8 or tuple(batch.shape[1:]) != reading.case.shape:
            raise ValueError(f"a batch is {batch.dtype} {tuple(batch.shape)}; it must be uint8 [b, C, H, W]")
        hashes.append(pixel_hashes(batch))
        images_seen += len(batch)
        if images_seen >= until:
            break
    batches.close()
    return np.concatenate(hashes)


def timed_pass(loader: Loader, reading: Reading, *, first_only: bool) -> Measured:
    wait_for_the_start()
    images, first_batch_seconds = 0, 0.0
    cpu, started = cpu_seconds(), time.perf_counter()
    batches = loader.batches(reading)
    for batch in batches:
        if not images:
            first_batch_seconds = time.perf_counter() - started
        images += len(batch)
        if first_only:
            break
    wall = time.perf_counter() - started
    batches.close()
    del batches
    gc.collect()  # ends worker processes: only then is their time known
    return Measured(
        images=images,
        wall_seconds=wall,
        cpu_seconds=cpu_seconds() - cpu,
        first_batch_seconds=first_batch_seconds,
        peak_rss_mb=peak_rss_mb(workers=reading.workers),
    )


def timed_work(work: Callable[[], None], *, images: int) -> Measured:
    wait_for_the_start()
    cpu, started = cpu_seconds(), time.perf_counter()
    work()
    wall = time.perf_counter() - started
    return Measured(
        images=images,
        wall_seconds=wall,
        cpu_seconds=cpu_seconds() - cpu,
        first_batch_seconds=0.0,
        peak_rss_mb=peak_rss_mb(workers=0),
    )


def wait_for_the_start() -> None:
    """Ranks start together, once each has imported what it needs."""
    answer(READY)
    sys.stdin.readline()


def cpu_seconds() -> float:
    """Of this process and all below it, ended or alive."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_rss_mb(*, workers: int) -> float:
    # ru_maxrss of a process starts at its parent's; VmHWM starts at exec
    status = Path("/proc/self/status").read_text()
    own_kib = int(status.split("VmHWM:")[1].split()[0])
    return (own_kib + workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def main(task: str) -> None:
    os.dup2(1, ANSWERS, inheritable=False)
    os.dup2(2, 1)  # what peers print goes to the log
    try:
        answer(run_task(Task.from_json(task)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # some peers' threads do not end


def answer(value: Any) -> None:
    os.write(ANSWERS, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1])
