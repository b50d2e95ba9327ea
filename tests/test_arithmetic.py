"""float32 means the same where a job computes, and what the caller had elsewhere; no weight and no score moves by it."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import vaejob
from tests.test_resident import PIXELS, job_on
from vaejob.data.batches import open_data
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.evaluate import evaluate
from vaejob.training.step import make_optimizer, make_scorer, train_step

IWAE = ("objective.bound=iwae", "objective.samples=50", "data.global_batch=90")


class Arithmetic(NamedTuple):
    half_of_the_least_normal_float: float
    convolutions: str


def here() -> Arithmetic:
    return Arithmetic(sys.float_info.min / 2, torch.backends.cudnn.conv.fp32_precision)


OWN, CALLERS = Arithmetic(0.0, "ieee"), Arithmetic(sys.float_info.min / 2, "tf32")


def test_it_is_that_of_a_job_only_where_a_job_computes(tmp_path: Path) -> None:
    pack(ArraySource("noise", PIXELS), f"{tmp_path}/noise")
    job = job_on(f"{tmp_path}/noise/train", "data.test=null", bucket=f"{tmp_path}/runs")
    assert here() == CALLERS
    inside = list[Arithmetic]()

    def should_stop() -> bool:
        inside.append(here())
        return False

    vaejob.train(job, should_stop=should_stop)
    assert set(inside) == {OWN}
    assert here() == CALLERS

    scores = list[Arithmetic]()
    model = vaejob.load(f"{tmp_path}/runs/run")
    model.evaluate(open_data(job.data.train), on_progress=lambda done: scores.append(here()))
    assert set(scores) == {OWN}
    assert here() == CALLERS
    with own_arithmetic():
        model.evaluate(open_data(job.data.train))
        assert here() == OWN  # as it was


USERS = {
    "torch's own": "pass",
    "the older switch": "cudnn.allow_tf32 = False",
    "of convolutions": "cudnn.conv.fp32_precision = 'ieee'",
    "of everything": "torch.backends.fp32_precision = 'tf32'; cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'none'",
}


@pytest.mark.parametrize("set_by_user", USERS.values(), ids=USERS)
def test_a_gpus_float32_is_whole_whatever_the_caller_has_set(set_by_user: str) -> None:
    """In a process of its own; what torch tells of itself is all that a machine without GPU can see."""
    script = f"""
import torch
from vaejob.training.arithmetic import own_arithmetic
cudnn = torch.backends.cudnn
def told():
    try:
        older = cudnn.allow_tf32
    except RuntimeError:  # torch's answer where the older switch and a newer one disagree
        older = "not told"
    return older, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, torch.backends.fp32_precision
{set_by_user}
before = told()
with own_arithmetic():
    assert told()[:3] == (False, "ieee", "ieee"), told()
    with own_arithmetic():
        pass
    assert told()[:3] == (False, "ieee", "ieee"), told()
assert told() == before, (told(), before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_and_scores_of_the_iwae_stay_the_same_to_the_bit() -> None:
    as_zero, kept = trained(zero=True), trained(zero=False)
    assert as_zero.subnormal_slopes == 0
    assert kept.subnormal_slopes > 1000  # else nothing would be shown
    assert torch.equal(as_zero.weights, kept.weights)
    assert as_zero.score == kept.score


class Trained(NamedTuple):
    weights: Tensor
    subnormal_slopes: int
    """Of the objective by the logits of each sample."""
    score: float
    """Bits/dim of the bound."""


def trained(*, zero: bool) -> Trained:
    """By some steps from weights that put the samples of an image far apart."""
    job, device = job_on("memory://nowhere", *IWAE), torch.device("cpu")
    scorer = make_scorer(job, shape=(3, 4, 4))
    output = [module for module in scorer.modules() if isinstance(module, torch.nn.Linear)][-1]
    counts = list[int]()
    output.register_full_backward_hook(lambda _module, _inputs, slopes: counts.append(subnormal(slopes[0])))  # type: ignore[index]
    with torch.no_grad():
        output.weight.mul_(40)
    optimizer = make_optimizer(job.optimizer, scorer)
    ids, images = np.arange(len(PIXELS)), torch.from_numpy(PIXELS)
    with own_arithmetic() if zero else nullcontext():
        for epoch in range(20):
            train_step(
                scorer, optimizer, images, ids, job=job, pixels=scorer.pixels, epoch=epoch, beta=1.0,
                learning_rate=1e-3, weight=1 / len(ids),
            )  # fmt: skip
    score = evaluate if zero else evaluate.__wrapped__  # type: ignore[attr-defined]
    totals = score(scorer, [(ids, PIXELS)], dims_per_image=48, config=job.likelihood, device=device, samples=50)
    weights = torch.nn.utils.parameters_to_vector(scorer.parameters()).detach()
    return Trained(weights, sum(counts), totals.bits_per_dim)


def subnormal(numbers: Tensor) -> int:
    """By their bits: comparisons know none where they count as zero."""
    magnitude = numbers.contiguous().view(torch.int32) & 0x7FFFFFFF
    return int(((magnitude > 0) & (magnitude < 0x00800000)).sum())
