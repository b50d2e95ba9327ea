"""Pairs on a noisy machine: passes that take turns, and the ratios within a round. Costs are of a whole process."""

import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from multiprocessing.connection import Connection
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


Turn = Callable[[], Cost]
"""Has one pass done."""

Work = Callable[[Callable[[int], None]], None]
"""Does passes for ever; after each it calls what it was given with the pass's images, which returns when the next may begin."""


def alternate(
    passes: Mapping[str, Turn], *, rounds: int, seconds: float
) -> Iterator[tuple[dict[str, Cost], list[dict[str, Cost]]]]:
    """The first pass of each, which warms up and compiles, and the rounds so far, after every round.

    A round has all passes, in random order. Rounds end early where the clock has come to so many seconds, but not before 3.
    """
    order, names, until = random.Random(0), list(passes), time.perf_counter() + seconds
    first, found = {name: passes[name]() for name in names}, []
    while len(found) < min(rounds, 3) or (len(found) < rounds and time.perf_counter() < until):
        order.shuffle(names)
        found.append({name: passes[name]() for name in names})
        told = ", ".join(f"{name} {1e3 * cost.cpu_seconds / cost.images:.3g}" for name, cost in found[-1].items())
        print(f"round {len(found)}: CPU ms an image: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
        yield first, found


def in_this_process(work: Pass) -> Turn:
    def turn() -> Cost:
        cpu, wall = time.process_time(), time.perf_counter()
        images = work()
        seconds = time.perf_counter() - wall
        return Cost(images, time.process_time() - cpu, seconds)

    return turn


class OwnProcess:
    """A fork of this process, which stands still between its passes: what one side sets or keeps does not reach the other.

    It ends with this process, or where it is told to. What it was in the middle of is lost. Its work has one thread: OpenMP's,
    if this process has begun others, are not in the fork, which would wait for them for ever.
    """

    def __init__(self, name: str, work: Work) -> None:
        self._name = name
        self._here, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=self._serve, args=(work, there))
        self._process.start()
        there.close()

    def __call__(self) -> Cost:
        """One pass. Raises RuntimeError where the process has ended; it has said why."""
        try:
            self._here.send(None)
            return Cost(*self._here.recv())
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"{self._name} ended with {self._process.exitcode} before its pass did") from None

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _serve(self, work: Work, there: Connection) -> None:
        self._here.close()
        cpu, wall = 0.0, 0.0

        def begin() -> None:
            nonlocal cpu, wall
            try:
                there.recv()
            except EOFError:
                os._exit(0)
            cpu, wall = time.process_time(), time.perf_counter()

        def passed(images: int) -> None:
            seconds = time.perf_counter() - wall
            time.sleep(SETTLE_SECONDS)
            there.send((images, time.process_time() - cpu, seconds))
            begin()

        begin()
        work(passed)


def repeated(work: Pass) -> Work:
    def passes(passed: Callable[[int], None]) -> None:
        while True:
            passed(work())

    return passes


def whole_job(job: vaejob.JobConfig, *, images: int) -> Work:
    """A job's loop asks after every batch whether it should stop; after so many images it is kept waiting for the answer."""
    assert images % job.data.global_batch == 0, images

    def passes(passed: Callable[[int], None]) -> None:
        batches = count(1)

        def should_stop() -> bool:
            if next(batches) % (images // job.data.global_batch) == 0:
                passed(images)
            return False

        vaejob.train(job, should_stop=should_stop)

    return passes
