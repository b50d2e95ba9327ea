"""The benchmarks' timer: what its interval promises, and that jobs take turns."""

import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

import vaejob.training.loop
from tests.benchmarks.loop import pack_digits
from tests.benchmarks.paired import Cost, OwnProcess, alternate, in_this_process, repeated, spread, whole_job
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

    passes = {name: in_this_process(lambda name=name: work(name)) for name in "abc"}  # type: ignore[misc]
    *_, (first, rounds) = alternate(passes, rounds=5, seconds=60)
    assert [sorted(calls[i : i + 3]) for i in range(0, len(calls), 3)] == [list("abc")] * 6
    assert list(first) == list("abc")
    assert len(rounds) == 5


def test_a_process_of_its_own_works_only_when_it_is_its_turn() -> None:
    done = multiprocessing.Value("i", 0)

    def work() -> int:
        with done.get_lock():
            done.value += 1
        spent = time.process_time()
        while time.process_time() < spent + 0.05:
            pass
        return 7

    process = OwnProcess("counts", repeated(work))
    try:
        for turn in (1, 2, 3):
            images, cpu_seconds, wall_seconds = process()
            assert (images, done.value) == (7, turn)
            assert cpu_seconds >= 0.05
            assert wall_seconds >= 0.05
            time.sleep(0.05)
            assert done.value == turn
    finally:
        process.end()


def test_what_a_process_of_its_own_sets_stays_there() -> None:
    def work() -> int:
        os.environ["OF_ONE_SIDE"] = "set"
        return 1

    process = OwnProcess("sets", repeated(work))
    try:
        assert process() == Cost(1, ANY, ANY)
        assert "OF_ONE_SIDE" not in os.environ
    finally:
        process.end()


def test_a_job_waits_after_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_digits(str(tmp_path), images=400)
    job = load_config(
        "mnist-iwae-1", f"data.train={data}", "data.test=null", "cluster.workers=0", "cluster.cpus_per_worker=1",
        "run.bucket=memory://waits", "training.images=1000000", "model.hidden=[8]", "data.global_batch=50",
    )  # fmt: skip
    steps, train_step = multiprocessing.Value("i", 0), vaejob.training.loop.train_step

    def counted(*arguments: Any, **named: Any) -> Any:
        with steps.get_lock():
            steps.value += 1
        return train_step(*arguments, **named)

    monkeypatch.setattr("vaejob.training.loop.train_step", counted)
    process = OwnProcess("job", whole_job(job, images=200))
    try:
        for turn in (1, 2, 3):
            assert process().images == 200
            assert steps.value == 4 * turn
            time.sleep(0.05)
            assert steps.value == 4 * turn
    finally:
        process.end()


def test_what_ends_a_job_ends_its_pass(capfd: pytest.CaptureFixture[str]) -> None:
    job = load_config(
        "mnist-iwae-1", "data.train=memory://nothing", "data.test=null", "cluster.workers=0", "run.bucket=memory://none"
    )
    process = OwnProcess("job", whole_job(job, images=100))
    with pytest.raises(RuntimeError, match="job ended with 1 before its pass did"):
        process()
    assert "memory://nothing" in capfd.readouterr().err
