"""Averaged weights follow those that are trained, in images, and are what a model is judged and used by."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vaejob
from tests.test_checkpoint import assert_equal
from tests.test_stability import newest_state, pack_digits, small_job
from vaejob.config import OptimizerConfig
from vaejob.storage import open_bucket
from vaejob.storage.runs import read_record, recorded_images
from vaejob.training.checkpoint import read_state
from vaejob.training.evaluate import evaluate
from vaejob.training.schedule import average_share
from vaejob.training.step import make_scorer, move_average

EMA = 900.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, a run that keeps a checkpoint of every step with averaged weights, and one without any."""
    folder = tmp_path_factory.mktemp("home")
    digits = pack_digits(folder / "digits")
    every_step = ("checkpoint.every_images=1", "checkpoint.keep_last=99")
    vaejob.train(small_job(digits, folder / "averaged", f"optimizer.ema={EMA}", *every_step))
    vaejob.train(small_job(digits, folder / "plain", "checkpoint.every_images=0"))
    return folder


def test_average_is_that_of_a_plain_loop_over_every_steps_weights(home: Path) -> None:
    run = open_bucket(f"{home}/averaged/run")
    images = recorded_images(run)
    states = [read_state(run, read_record(run, seen)) for seen in images]
    assert len(states) == 41
    averages = None
    for before, after, tensors in zip([0, *images], images, states, strict=False):
        weights = {n.removeprefix("model."): w.double().numpy() for n, w in tensors.items() if n.startswith("model.")}
        share = 1 - math.exp(-(after - before) / min(EMA, after / 10))
        averages = averages or {name: np.zeros_like(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            averages[name] = averages[name] + share * (weight - averages[name])
            if after > 500:  # what was there before the first step weighs nothing
                np.testing.assert_allclose(tensors[f"ema.{name}"].numpy(), averages[name], rtol=2e-4, atol=2e-6)
    apart = (states[-1]["ema.vae.output.weight"] - states[-1]["model.vae.output.weight"]).abs().max()
    assert apart > 1e-3


def test_average_changes_nothing_that_is_trained(home: Path) -> None:
    averaged, plain = (newest_state(open_bucket(f"{home}/{name}/run")) for name in ("averaged", "plain"))
    assert not any(name.startswith("ema.") for name in plain)
    assert_equal({name: tensor for name, tensor in averaged.items() if not name.startswith("ema.")}, plain)


def test_models_are_judged_and_loaded_with_the_average(home: Path) -> None:
    model, data = vaejob.load(f"{home}/averaged/run"), vaejob.open_data(f"{home}/digits/test")
    state = newest_state(open_bucket(f"{home}/averaged/run"))
    assert_equal({f"ema.{name}": weight for name, weight in model.scorer.state_dict().items()},
                 {name: tensor for name, tensor in state.items() if name.startswith("ema.")})  # fmt: skip
    assert model.record.held_out is not None
    assert model.evaluate(data).negative_bound_nats == model.record.held_out["negative_bound_nats"]
    trained = make_scorer(model.job, shape=(1, 8, 8))
    trained.load_state_dict({name.removeprefix("model."): w for name, w in state.items() if name.startswith("model.")})
    other = evaluate(
        trained, data.evaluation_blocks(), dims_per_image=64, config=model.job.likelihood, device=model.device
    )
    assert other.negative_bound_nats != model.record.held_out["negative_bound_nats"]


def test_stopped_run_goes_on_with_its_average_bit_for_bit(home: Path, tmp_path: Path) -> None:
    job = small_job(home / "digits", tmp_path, f"optimizer.ema={EMA}", "training.report_every_images=64")
    asked = iter([False] * 12 + [True] + [False] * 99)
    vaejob.train(job, should_stop=lambda: next(asked))
    run = open_bucket(f"{tmp_path}/run")
    assert recorded_images(run)[-1] < 1000
    vaejob.train(job, should_stop=lambda: False)
    assert_equal(newest_state(run), newest_state(open_bucket(f"{home}/averaged/run")))


@given(
    ema=st.floats(1, 1e6), start=st.integers(10**8, 10**9), cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=20)
)
def test_average_looks_back_over_images_whatever_the_batch(ema: float, start: int, cuts: list[int]) -> None:
    """What is left of the past after some images is e^(-images / ema), in one batch or in many."""
    config, kept, at = OptimizerConfig(ema=ema), 1.0, start
    for size in cuts:
        kept *= 1 - average_share(config, before=at, after=at + size)
        at += size
    assert kept == pytest.approx(math.exp(-(at - start) / ema), rel=1e-6, abs=1e-15)


def test_average_forgets_the_initial_weights() -> None:
    config, kept = OptimizerConfig(ema=1e9), 1.0
    for after in range(100, 100_001, 100):
        kept *= 1 - average_share(config, before=after - 100, after=after)
        # A power law: after n images, those before n / 2 weigh about 2^-10.
        assert average_share(config, before=after - 100, after=after) == pytest.approx(-math.expm1(-1000 / after))
    assert kept < 1e-25


def test_skipped_step_leaves_the_average_alone() -> None:
    average, weights = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = [parameter.clone() for parameter in average.parameters()]
    move_average(average, weights, share=0.5, skipped=torch.tensor(1.0))
    assert all(map(torch.equal, before, average.parameters()))
    move_average(average, weights, share=0.5, skipped=torch.tensor(0.0))
    for was, now, goal in zip(before, average.parameters(), weights.parameters(), strict=True):
        torch.testing.assert_close(now, (was + goal) / 2)
