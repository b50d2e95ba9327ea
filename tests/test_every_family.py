"""Every family trains alike on one rank or two, compiled or not, in bfloat16, with averaged weights, and resumed."""

import functools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

import vaejob
import vaejob.training.loop
from tests.ranks import leave
from tests.test_checkpoint import assert_equal
from tests.test_stability import WorkerWithLedger, newest_state, pack_digits, small_job
from vaejob.config import JobConfig
from vaejob.run import begin, work
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_record, read_rows, recorded_images
from vaejob.training.checkpoint import read_state
from vaejob.training.worker import Event

EMA = 200.0
FAMILIES = {
    "mlp": ("model.hidden=[16]",),
    "two layers": ("model.activation=tanh", "model.upper_latent=3", "model.upper_hidden=[8]", "objective.bound=iwae",
                   "objective.samples=3", "objective.gradient=dreg", "likelihood.pixels=bernoulli", "likelihood.binarize=dynamic"),
    "conv": ("model.family=conv", "model.channels=[4,6]", "likelihood.pixels=discretized-logistic-mixture",
             "likelihood.components=2"),
    "tied": ("model.family=tied", "likelihood.pixels=gaussian"),
    "tied conv": ("model.family=tied", "model.tied_layers=conv", "model.channels=[4,6]",
                  "likelihood.pixels=discretized-gaussian"),
    "hierarchical": ("model.family=hierarchical", "model.layers=1x1,4x1,8x1", "model.width=8", "model.latent_channels=2",
                     "likelihood.pixels=categorical", "likelihood.bits=3"),
    "latent table": ("model.family=decoder-only", "objective.pairing=latent-table"),
}  # fmt: skip
COMPILED = [family for family in FAMILIES if family not in ("mlp", "two layers")]  # the latter refuses, with dreg


def job_of(family: str, digits: Path, bucket: Path, *overrides: str) -> JobConfig:
    return small_job(
        digits, bucket, *FAMILIES[family], "training.images=640", "training.report_every_images=320",
        "checkpoint.every_images=1", "checkpoint.keep_last=99", f"optimizer.ema={EMA}", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, and a run of ten steps of each family, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("families")
    digits = pack_digits(folder / "digits")
    for family in FAMILIES:
        vaejob.train(job_of(family, digits, folder / family))
    return folder


def held_out(folder: Path) -> float:
    run = open_bucket(f"{folder}/run")
    totals = read_record(run, recorded_images(run)[-1]).held_out
    assert totals is not None
    assert not totals["non_finite"]
    return float(totals["negative_bound_nats"]) / totals["images"]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The weights, but for rounding: Adam divides by what is left of small gradients, so a few may be further apart."""
    assert found.keys() == expected.keys()
    for name in found:
        if name.startswith(("model.", "ema.")):
            apart = (found[name] - expected[name]).abs()
            assert apart.double().square().mean().sqrt() < 1e-5, name
            assert apart.max() < 5e-4, name  # half a step


def two_ranks(rank: int, folder: str, jobs: list[JobConfig]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for job in jobs:
        work(job, WorkerWithLedger(job, rank=rank, world_size=2))
    leave()


def test_two_ranks_train_as_one(home: Path, tmp_path: Path) -> None:
    jobs = [job_of(family, home / "digits", tmp_path / family) for family in FAMILIES]
    assert all(map(begin, jobs))
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path), jobs), nprocs=2)
    for family in FAMILIES:
        one, two = (open_bucket(f"{folder / family}/run") for folder in (home, tmp_path))
        assert_close(newest_state(two), newest_state(one))
        assert held_out(tmp_path / family) == pytest.approx(held_out(home / family), rel=1e-4)
        rows = [[row for row in read_rows(run) if row["split"] == "train"] for run in (one, two)]
        assert [row["world_size"] for row in rows[1]] == [2] * len(rows[0])
        for each, both in zip(*rows, strict=True):
            assert (both["images"], both["steps"], both["ids_digest"]) == (
                each["images"],
                each["steps"],
                each["ids_digest"],
            )
            assert both["gradient_norms"] == pytest.approx(each["gradient_norms"], rel=1e-4)


def two_ranks_compiled(rank: int, folder: str, jobs: list[JobConfig]) -> None:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    two_ranks(rank, folder, jobs)


def test_two_ranks_compiled_train_as_one(home: Path, tmp_path: Path) -> None:
    """As one graph, and block by block with what backward needs computed once more."""
    settings = {"conv": ("training.compile=true",), "hierarchical": ("training.compile=true", "model.recompute=true")}
    jobs = [job_of(family, home / "digits", tmp_path / family, *own) for family, own in settings.items()]
    assert all(map(begin, jobs))
    torch.multiprocessing.spawn(two_ranks_compiled, args=(str(tmp_path), jobs), nprocs=2)
    for family in settings:
        one, two = (open_bucket(f"{folder / family}/run") for folder in (home, tmp_path))
        assert_close(newest_state(two), newest_state(one))


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_run_goes_on_bit_for_bit(family: str, home: Path, tmp_path: Path) -> None:
    job = job_of(family, home / "digits", tmp_path)
    asked = iter([False] * 5 + [True])
    vaejob.train(job, should_stop=lambda: next(asked))
    run = open_bucket(f"{tmp_path}/run")
    assert recorded_images(run)[-1] == 384
    vaejob.train(job)
    assert_equal(newest_state(run), newest_state(open_bucket(f"{home / family}/run")))


@pytest.mark.parametrize("family", FAMILIES)
def test_average_is_that_of_a_plain_loop(family: str, home: Path) -> None:
    run = open_bucket(f"{home / family}/run")
    states = [read_state(run, read_record(run, images)) for images in range(64, 641, 64)]
    for name in states[0]:
        if name.startswith("ema."):
            average = np.zeros(states[0][name].shape)
            for after, tensors in zip(range(64, 641, 64), states, strict=True):
                share = 1 - math.exp(-64 / min(EMA, after / 10))
                average = average + share * (tensors[f"model.{name.removeprefix('ema.')}"].double().numpy() - average)
            np.testing.assert_allclose(states[-1][name].numpy(), average, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_learns_about_the_same(family: str, home: Path, tmp_path: Path) -> None:
    vaejob.train(job_of(family, home / "digits", tmp_path, "training.precision=bf16", "checkpoint.every_images=0"))
    state, exact = newest_state(open_bucket(f"{tmp_path}/run")), newest_state(open_bucket(f"{home / family}/run"))
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in exact.items()
    }
    assert any(not torch.equal(state[name], exact[name]) for name in state if name.startswith("model."))
    assert held_out(tmp_path) == pytest.approx(held_out(home / family), rel=0.01, abs=0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("family", "backend"),
    [("mlp", "inductor"), *((family, "aot_eager") for family in COMPILED)]
    + [pytest.param(family, "inductor", marks=pytest.mark.slow) for family in COMPILED],
)
def test_compiled_steps_are_the_same_steps(
    family: str, backend: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inductor is what jobs are compiled with; aot_eager takes the same graphs, and seconds instead of minutes."""
    told: list[Event] = []
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    job = job_of(family, home / "digits", tmp_path, "training.compile=true", "checkpoint.every_images=0")
    vaejob.train(job, on_event=told.append)
    assert_close(newest_state(open_bucket(f"{tmp_path}/run")), newest_state(open_bucket(f"{home / family}/run")))
    notes = [event.body["text"] for event in told if event.kind == "note"]
    assert len(notes) == 1
    assert notes[0].startswith("compiled the model in ")


def test_no_compiler_is_one_line_before_any_step(home: Path, tmp_path: Path) -> None:
    job = job_of("mlp", home / "digits", tmp_path, "training.compile=true")
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    (tmp_path / "bin").mkdir()
    command = [sys.executable, "-m", "vaejob", "train", str(tmp_path / "job.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"vaejob: training.compile is true, and no C++ compiler is on PATH of {platform.node()}; install g++ there, or set "
        "training.compile=false"
    ]
