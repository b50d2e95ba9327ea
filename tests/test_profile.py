"""training.profile tells where the time went, adds up, and changes no number of the run."""

import functools
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from typer.testing import CliRunner

import vaejob
from tests.test_resident import addresses, job_of, outcome, rank_of_jobs
from vaejob.cli import app
from vaejob.config import JobConfig
from vaejob.errors import RunError
from vaejob.storage import open_bucket
from vaejob.storage.profiles import read_profile
from vaejob.training import profile
from vaejob.training.profile import Profile, stage
from vaejob.training.worker import Event

__all__ = ["addresses", "job_of"]
"""Fixtures of another file."""

PARTS = {"data wait", "copy", "noise", "forward", "backward", "guard", "optimizer", "totals", "report", "checkpoint"}


def test_profiled_run_is_the_same_and_says_where_its_time_went(job_of: Any, tmp_path: Path) -> None:
    """The clock runs through the second epoch, so that resident images are taken in it."""
    told: list[Event] = []
    common = "data.global_batch=10", "data.resident_bytes=10000", "optimizer.ema=100"
    vaejob.train(job_of("plain", *common, data="raw"))
    vaejob.train(job_of("profiled", *common, "training.profile=true", data="raw"), on_event=told.append)
    assert outcome(f"{tmp_path}/profiled") == outcome(f"{tmp_path}/plain")

    run = open_bucket(f"{tmp_path}/profiled")
    (found,) = read_profile(run)
    spent = {row["stage"]: row["seconds_per_step"] for row in found["stages"]}
    assert spent.keys() == {*PARTS, "average", "communication", "held-out", "between them"}
    assert found["steps"] == 25 - profile.STEPS_BEFORE - profile.STEPS_TRACED
    assert sum(spent.values()) == pytest.approx(found["seconds_per_step"])
    assert sum(row["share"] for row in found["stages"]) == pytest.approx(1)
    assert all(seconds > 0 for seconds in spent.values())
    assert spent["between them"] < 0.5 * found["seconds_per_step"]  # a hundredth or two, where the machine is quiet
    trace = json.loads(gzip.decompress(run.read(found["trace"])))
    names = [event["name"] for event in trace["traceEvents"]]
    for name in ("data wait", "forward", "backward", "optimizer"):
        assert names.count(name) == profile.STEPS_TRACED

    notes = [event.body["text"] for event in told if event.kind == "note"]
    assert [note.split(" ms in")[0].rsplit(" ", 1)[0] for note in notes if note.startswith("profile of")] == [
        "profile of 13 steps of"
    ]
    shown = CliRunner().invoke(app, ["show", f"{tmp_path}/profiled"]).stdout
    assert "profile of 13 steps, in ms a step" in shown
    assert json.loads(CliRunner().invoke(app, ["show", f"{tmp_path}/profiled", "--json"]).stdout)["profile"] == [found]


def test_files_of_others_and_damage_do_not_keep_a_run_from_being_shown(job_of: Any, tmp_path: Path) -> None:
    vaejob.train(job_of("profiled", "data.global_batch=10", "training.profile=true", data="raw"))
    run = open_bucket(f"{tmp_path}/profiled")
    before = read_profile(run)
    run.write("profile/notes.json", b"mine")
    assert read_profile(run) == before
    (key,) = [key for key in run.keys("profile/") if key.endswith("-0of1.json")]
    run.write(key, b"{")
    with pytest.raises(RunError, match=f"{key} is no profile of vaejob, or is damaged"):
        read_profile(run)
    shown = CliRunner().invoke(app, ["show", run.url])
    assert shown.exit_code == 0
    assert "is no profile of vaejob" in shown.output


def test_two_workers_are_profiled_apart_and_wait_for_one_another(job_of: Any, tmp_path: Path) -> None:
    """Their images resident or streamed, their steps profiled or not, they train the same."""
    jobs = [
        job_of("streamed"),
        job_of("resident", "data.resident_bytes=10000", "training.profile=true", "data.global_batch=16"),
    ]
    torch.multiprocessing.spawn(rank_of_jobs, args=(2, str(tmp_path), jobs), nprocs=2)
    assert outcome(f"{tmp_path}/resident") == outcome(f"{tmp_path}/streamed")
    found = read_profile(open_bucket(f"{tmp_path}/resident"))
    assert [rank["rank"] for rank in found] == [0, 1]
    for rank in found:
        spent = {row["stage"]: row for row in rank["stages"]}
        assert spent.keys() >= PARTS
        # After each backward pass, and where all ask whether to stop.
        assert spent["communication"]["times"] == 2 * rank["steps"]
        assert sum(row["share"] for row in rank["stages"]) == pytest.approx(1)


def one_of_two_compiled(rank: int, folder: str, job: JobConfig) -> None:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    rank_of_jobs(rank, 2, folder, [job])


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_gradients_are_exchanged_while_others_are_computed(compiled: str, job_of: Any, tmp_path: Path) -> None:
    """By each rank's trace, of a ladder with more weights than the first bucket of gradients: their sum is asked for meanwhile."""
    ladder = ["model.family=hierarchical", "model.layers=1x1,2x1,4x2", "model.width=192", "data.global_batch=16"]
    job = job_of("profiled", *ladder, "training.profile=true", f"training.compile={compiled}")
    torch.multiprocessing.spawn(one_of_two_compiled, args=(str(tmp_path), job), nprocs=2)
    for rank in read_profile(run := open_bucket(f"{tmp_path}/profiled")):
        events = json.loads(gzip.decompress(run.read(rank["trace"])))["traceEvents"]
        passes = spans(events, "backward")
        assert len(passes) == profile.STEPS_TRACED
        for begin, end in passes:
            sums, products = (
                [one for one in spans(events, name) if begin <= one[0] <= end]
                for name in ("c10d::allreduce_", "aten::convolution_backward")
            )
            assert len(sums) > 1
            assert min(sums)[0] < max(products)[0]  # as the passing thread asks: gloo may be kept waiting for a core


def spans(events: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Begin and end of each event of that name, in microseconds."""
    return [(one["ts"], one["ts"] + one["dur"]) for one in events if one["name"] == name and one["ph"] == "X"]


def test_stage_inside_another_is_counted_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clocks = Profile.__new__(Profile)
    clocks._clocks, clocks._inside, clocks._began = {}, [], 0.0
    clocks._tracer = clocks._last_gradient = None
    clocks._on_gpu = False
    monkeypatch.setattr(profile, "_running", clocks)
    with stage("guard"):
        now += 2
        with stage("optimizer"):
            now += 5
        now += 1
    assert {name: clock.seconds for name, clock in clocks._clocks.items()} == {"guard": 3, "optimizer": 5}


def test_a_mark_is_nothing_while_no_profile_runs() -> None:
    assert stage("forward") is stage("backward")
