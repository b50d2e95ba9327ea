"""Scores by a compiled model are the scores, with bounds in between as before: only rounding differs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaejob
from tests.test_every_family import FAMILIES, job_of
from tests.test_stability import pack_digits
from vaejob.loaded import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
    pytest.mark.usefixtures("unchecked_shapes"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_scores_are_the_scores(precision: vaejob.config.Precision, tmp_path: Path) -> None:
    torch.compiler.reset()
    digits = pack_digits(tmp_path / "digits")
    vaejob.train(job_of("mlp", digits, tmp_path, "checkpoint.every_images=0"))
    model, data = load(f"{tmp_path}/run"), vaejob.open_data(f"{digits}/test")
    eager, compiled = (model.evaluate(data, samples=7, precision=precision, compiled=how) for how in (False, True))
    assert compiled.images == eager.images == data.manifest.images
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    assert compiled.mean("negative_bound") == pytest.approx(eager.mean("negative_bound"), rel=tolerance)
    assert compiled.mean("negative_bound") != pytest.approx(model.evaluate(data).mean("negative_bound"), rel=1e-6)


ONE_GRAPH = """
import sys
import numpy as np, torch
from vaejob.likelihood.bounds import importance_bound, log_weights
from vaejob import load_config
from vaejob.training.step import evaluation_noise, make_scorer

for path in sys.argv[1:]:
    torch.compiler.reset()
    scorer = make_scorer(load_config(path), shape=(1, 8, 8)).eval()
    noise = evaluation_noise(np.arange(5), device=torch.device("cpu"))
    levels = scorer.pixels.to_levels(torch.randint(256, (5, 1, 8, 8)).to(torch.uint8), noise)
    eager, compiled = (
        importance_bound(scorer.vae, scorer.pixels, levels, noise, samples=6, chunk=4, weigh=weigh).log_likelihood
        for weigh in (log_weights, torch.compile(log_weights, backend="aot_eager", fullgraph=True))
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
"""


def test_log_weights_are_one_graph_and_the_same(tmp_path: Path) -> None:
    """In a process without checks of shapes, which no graph can hold; fullgraph refuses to step out of it, for draws too."""
    jobs = {family: job_of(family, tmp_path, tmp_path) for family in FAMILIES if family != "latent table"}
    for number, job in enumerate(jobs.values()):
        (tmp_path / f"{number}.yaml").write_text(job.to_yaml())
    paths = [str(tmp_path / f"{number}.yaml") for number in range(len(jobs))]
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LADDERS = """
import sys
from functools import partial
import numpy as np, torch
from torch._dynamo.utils import counters

torch.compile = partial(torch.compile, backend="aot_eager")
from vaejob import load_config
from vaejob.training.evaluate import evaluate
from vaejob.training.step import make_scorer

images, graphs = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8), []
for layers in ("1x2,2x1,3x1,4x1,8x1", "1x2,2x3,3x1,4x3,8x4"):
    torch.compiler.reset()
    counters.clear()
    job = load_config(sys.argv[1], f"model.layers={layers}")
    scorer = make_scorer(job, shape=(1, 8, 8)).eval()
    eager, compiled = (
        evaluate(
            scorer, [(ids, images[ids]) for ids in np.split(np.arange(12), [5, 10])], dims_per_image=64,
            config=job.likelihood, device=torch.device("cpu"), samples=3, compiled=how,
        )
        for how in (False, True)
    )
    assert abs(compiled.mean("negative_bound") / eager.mean("negative_bound") - 1) < 1e-6, (compiled, eager)
    graphs.append(counters["stats"]["unique_graphs"])
print(*graphs)
"""


def test_a_ladder_is_compiled_by_blocks_and_a_deeper_one_takes_no_more_graphs(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_of("hierarchical", tmp_path, tmp_path).to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", LADDERS, str(tmp_path / "job.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # a rung of each size, the first rung of all, the output and the weights
    assert done.stdout.split() == 2 * [str(5 + 1 + 1 + 1)]
