"""A compiled step is the step: one graph of the forward and the backward pass, the same numbers but for rounding."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_every_family import FAMILIES, job_of
from vaejob.errors import ConfigError

SAME_GRADIENTS = """
import sys
from functools import partial
import numpy as np, torch

if sys.argv[1] != "inductor":
    torch.compile = partial(torch.compile, backend=sys.argv[1])
from vaejob import load_config
from vaejob.training.passes import CompiledPasses, CompiledScorer, both_passes
from vaejob.training.step import make_scorer, training_noise

def gradients(model, scorer, job, images, beta):
    ids = np.arange(7, 7 + images)
    keys = training_noise(ids, seed=1, epoch=2, device="cpu").keys
    own = torch.from_numpy(ids) if job.objective.own_codes else None
    levels = torch.randint(scorer.pixels.levels, (images, 1, 8, 8), generator=torch.Generator().manual_seed(images))
    scorer.zero_grad()
    terms, nats, norm = both_passes(model, levels.to(torch.uint8), keys, own, job=job, beta=beta, weight=0.25)
    if norm is not None:
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(p.grad for p in scorer.parameters()))
    assert all(parameter.grad.is_contiguous() for parameter in scorer.parameters())  # in the weights' order in memory
    given = [term.detach().clone() for term in (*terms, nats) if term is not None]
    return given + [parameter.grad.clone() for parameter in scorer.parameters()]

for path in sys.argv[2:]:
    torch.compiler.reset()
    job = load_config(path)
    scorer = make_scorer(job, shape=(1, 8, 8), images=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scorer.parameters():  # heads that start at zero would hide what comes before them
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    full = job.data.global_batch
    compiled = [CompiledScorer(scorer, sizes={full, 3} if scorer.vae.blocks else {full})]
    if job.objective.gradient == "standard" and not scorer.vae.blocks:
        compiled.append(CompiledPasses(scorer, job))
    for images, beta in ((full, 1.0), (full, 0.5), (3, 1.0)):  # a number that changes, a batch that is smaller
        expected = gradients(scorer, scorer, job, images, beta)
        for model in compiled:
            for found, right in zip(gradients(model, scorer, job, images, beta), expected, strict=True):
                case = f"{job.model.family}, {job.objective}, {type(model).__name__}, {images} images: "
                close = dict(rtol=2e-5, atol=1e-5 * right.abs().max().item(), msg=lambda text: case + text)
                torch.testing.assert_close(found, right, **close)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if scorer.vae.blocks:
        print(graphs)
    else:
        assert graphs == len(compiled), graphs  # neither beta nor the smaller batch made another
    torch._dynamo.utils.counters.clear()
"""


def check(backend: str, jobs: dict[str, list[str]], folder: Path) -> list[int]:
    """In a process without checks of shapes, which no graph can hold. Gives the graphs of each job made of blocks."""
    paths = []
    for number, (family, settings) in enumerate(jobs.items()):
        path = folder / f"{number}.yaml"
        path.write_text(job_of(family.partition(",")[0], folder, folder, "data.global_batch=5", *settings).to_yaml())
        paths.append(str(path))
    command = [sys.executable, "-c", SAME_GRADIENTS, backend, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_every_family_and_bound_is_one_graph_or_blocks_and_the_same(tmp_path: Path) -> None:
    jobs: dict[str, list[str]] = {family: [] for family in FAMILIES}
    jobs["two layers"] = ["objective.gradient=standard"]
    jobs["mlp, iwae"] = ["objective.bound=iwae", "objective.samples=4"]
    jobs["mlp, dreg"] = ["objective.bound=iwae", "objective.samples=4", "objective.gradient=dreg"]
    jobs["mlp, fixed code"] = ["model.family=decoder-only", "objective.pairing=fixed-code"]
    jobs["hierarchical, recomputed"] = ["model.recompute=true"]
    jobs["mlp, several codes"] = ["objective.samples=3", "objective.free_bits_nats=0.5"]
    check("aot_eager", jobs, tmp_path)


def test_a_deeper_ladder_takes_no_more_graphs(tmp_path: Path) -> None:
    """Both of more than eight of one function, where torch would stop compiling it: five sizes, two sizes of batches."""
    ladders = {"hierarchical": "1x2,2x1,3x1,4x1,8x1", "hierarchical, deeper": "1x2,2x3,3x1,4x3,8x4"}
    shallow, deep = check("aot_eager", {name: [f"model.layers={layers}"] for name, layers in ladders.items()}, tmp_path)
    # for each size of batches: a rung and a residual block of each size, the first rung of all, the output, and the terms
    assert shallow == deep == 2 * (5 + 5 + 1 + 1 + 1), (shallow, deep)


NINE_JOBS = """
from functools import partial
import numpy as np, torch

torch.compile = partial(torch.compile, backend="aot_eager")
from vaejob import load_config
from vaejob.training.passes import as_trained, both_passes
from vaejob.training.step import make_scorer, training_noise

levels, graphs = torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch._dynamo.utils.counters["stats"]
for number in range(1, 10):
    job = load_config("mnist-iwae-1", "data.train=x", "data.global_batch=4", "training.compile=true", f"model.latent={number}")
    model = as_trained(make_scorer(job, shape=(1, 4, 4)), job, world_size=1)
    for epoch in range(2):
        keys = training_noise(np.arange(4), seed=0, epoch=epoch, device="cpu").keys
        both_passes(model, levels, keys, None, job=job, beta=1.0, weight=0.25)
        assert graphs["unique_graphs"] == number, graphs
"""


def test_ninth_job_of_a_process_is_compiled_as_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", NINE_JOBS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_code_that_was_generated_computes_the_same(tmp_path: Path) -> None:
    check("inductor", {"mlp": []}, tmp_path)


@pytest.mark.parametrize("settings", [["model.upper_latent=3"], ["model.family=hierarchical", "model.layers=4x1,8x1"]])
def test_gradient_that_a_graph_gets_wrong_is_refused(settings: list[str], tmp_path: Path) -> None:
    """torch 2.13: hooks on codes that are drawn in the middle of a graph see no gradient that stays inside of it."""
    dreg = ["objective.bound=iwae", "objective.samples=4", "objective.gradient=dreg", "training.compile=true"]
    with pytest.raises(ConfigError, match="several stochastic layers, whose gradient a compiled graph gets wrong"):
        job_of("mlp", tmp_path, tmp_path, *settings, *dreg)
