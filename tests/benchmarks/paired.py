"""Pairs on a noisy machine: passes that take turns, and the ratios within a round. Costs are of this whole process."""

import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import vaejob

SETTLE_SECONDS = 0.02
"""After a pass, for threads that read ahead of it: each pass begins, and ends, with as much read."""

Pass = Callable[[], int]
"""Does the work and returns how many images that was."""


class Cost(NamedTuple):
    """Of one pass."""

    images: int
    cpu_seconds: float
    """Of all threads."""
    wall_seconds: float


class Spread(NamedTuple):
    """A median, and the interval that holds the true one in at least 95 of 100 such runs."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}, {self.most:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """By ranks, so that nothing is supposed of the noise; fewer than 6 values give their range, of less than 95 %."""
    ordered = sorted(values)
    count, left_out = len(ordered), 0
    # P(the k-th smallest of n exceeds the median) = P(fewer than k heads in n throws), at both ends
    while 2 * sum(math.comb(count, k) for k in range(left_out + 2)) <= 0.05 * 2**count:
        left_out += 1
    return Spread(statistics.median(ordered), ordered[left_out], ordered[-1 - left_out])


def measured(work: Pass) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    images = work()
    seconds = time.perf_counter() - wall
    time.sleep(SETTLE_SECONDS)
    return Cost(images, time.process_time() - cpu, seconds)


def alternate(
    passes: Mapping[str, Pass], *, rounds: int, seconds: float
) -> Iterator[tuple[dict[str, Cost], list[dict[str, Cost]]]]:
    """The first pass of each, which warms up and compiles, and the rounds so far, after every round.

    A round has all passes, in random order. Rounds end early where the clock has come to so many seconds, but not before 3.
    """
    order, names, until = random.Random(0), list(passes), time.perf_counter() + seconds
    first, found = {name: measured(passes[name]) for name in names}, []
    while len(found) < min(rounds, 3) or (len(found) < rounds and time.perf_counter() < until):
        order.shuffle(names)
        found.append({name: measured(passes[name]) for name in names})
        told = ", ".join(f"{name} {1e3 * cost.cpu_seconds / cost.images:.3g}" for name, cost in found[-1].items())
        print(f"round {len(found)}: CPU ms an image: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
        yield first, found


class PacedJob:
    """A whole job that trains on a thread of its own and stands still between passes, so that what it compiled lasts.

    Its loop asks after every batch whether it should stop, and is not answered until the next pass.
    """

    def __init__(self, job: vaejob.JobConfig, *, images: int) -> None:
        """images: of a pass, whole batches."""
        assert images % job.data.global_batch == 0, images
        self._images, self._batches = images, images // job.data.global_batch
        self._job, self._seen, self._ended = job, 0, False
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._train, daemon=True)

    def __call__(self) -> int:
        """One pass; the first one starts the job."""
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._arrived.acquire()
        if self._failure:
            raise self._failure
        return self._images

    def end(self) -> None:
        if self._thread.ident is not None:
            self._ended = True
            self._go.release()
            self._thread.join()

    def _train(self) -> None:
        try:
            self._go.acquire()
            vaejob.train(self._job, should_stop=self._should_stop)
        except BaseException as error:  # raised again where the pass was asked for
            self._failure = error
        self._arrived.release()

    def _should_stop(self) -> bool:
        self._seen += 1
        if self._seen % self._batches == 0:
            self._arrived.release()
            self._go.acquire()
        return self._ended
