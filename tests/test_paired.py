"""The benchmarks' timer: what its interval promises, and that jobs take turns."""

import math
import time

import numpy as np
import pytest

from tests.benchmarks.loop import pack_digits
from tests.benchmarks.paired import PacedJob, alternate, spread
from vaejob import load_config


@pytest.mark.parametrize("rounds", [6, 7, 9, 15, 30])
def test_the_interval_holds_the_true_median_in_95_of_100_runs(rounds: int) -> None:
    found = spread([float(i) for i in range(rounds)])
    left_out = int(found.least)
    # It misses where fewer than left_out + 1 values fall on one side of the median, each with probability a half.
    misses = 2 * sum(math.comb(rounds, k) for k in range(left_out + 1)) / 2**rounds
    assert misses <= 0.05
    assert misses + 2 * math.comb(rounds, left_out + 1) / 2**rounds > 0.05  # and no narrower one would
    assert found.most == rounds - 1 - left_out


def test_few_rounds_give_their_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_every_round_has_every_pass_once() -> None:
    calls: list[str] = []

    def work(name: str) -> int:
        calls.append(name)
        return 1

    passes = {name: (lambda name=name: work(name)) for name in "abc"}  # type: ignore[misc]
    *_, (first, rounds) = alternate(passes, rounds=5, seconds=60)
    assert [sorted(calls[i : i + 3]) for i in range(0, len(calls), 3)] == [list("abc")] * 6
    assert list(first) == list("abc")
    assert len(rounds) == 5


def test_a_job_stands_still_between_its_passes(tmp_path: object) -> None:
    seen: list[int] = []
    job = load_config(
        "mnist-iwae-1", f"data.train={pack_digits(str(tmp_path), images=400)}", "data.test=null", "cluster.workers=0",
        "run.bucket=memory://paced", "training.images=1000000", "model.hidden=[8]", "data.global_batch=50",
    )  # fmt: skip
    paced = PacedJob(job, images=200)
    for _ in range(3):
        assert paced() == 200
        seen.append(paced._seen)
        time.sleep(0.05)
        assert paced._seen == seen[-1]
    paced.end()
    assert np.diff(seen).tolist() == [4, 4]


def test_what_ends_a_job_ends_its_pass() -> None:
    job = load_config(
        "mnist-iwae-1", "data.train=memory://nothing", "data.test=null", "cluster.workers=0", "run.bucket=memory://none"
    )
    with pytest.raises(Exception, match="memory://nothing"):
        PacedJob(job, images=100)()
