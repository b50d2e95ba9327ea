"""bfloat16 is for products inside encoder and decoder; likelihoods, weights and held-out passes never leave float32."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.test_step import IDS, IMAGES, JOB
from vaejob.config import JobConfig, Precision
from vaejob.likelihood.pixels import make_pixels
from vaejob.model.noise import image_noise
from vaejob.training.checkpoint import TrainState
from vaejob.training.evaluate import evaluate
from vaejob.training.step import StepTerms, make_scorer, train_step

PIXELS = ["bernoulli", "continuous-bernoulli", "categorical", "discretized-logistic", "discretized-logistic-mixture",
          "discretized-gaussian", "gaussian"]  # fmt: skip
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"family": "mlp", "latent": 3, "hidden": [7]},
    "two layers": {"family": "mlp", "latent": 3, "hidden": [7], "upper_latent": 2, "upper_hidden": [5]},
    "conv": {"family": "conv", "latent": 3, "channels": [4, 6]},
    "tied": {"family": "tied", "latent": 3, "hidden": [7]},
    "tied conv": {"family": "tied", "latent": 3, "tied_layers": "conv", "channels": [4, 6]},
    "hierarchical": {"family": "hierarchical", "layers": "1x1,4x2", "width": 8, "latent_channels": 2},
    "decoder-only": {"family": "decoder-only", "latent": 3, "hidden": [7]},
}


def job_of(family: str, precision: str = "bf16", **objective: Any) -> JobConfig:
    plain = JOB.model_dump()
    plain["model"] |= FAMILIES[family]
    plain["training"]["precision"] = precision
    plain["objective"] |= objective
    if family == "decoder-only":
        plain["objective"]["pairing"] = "random" if objective else "latent-table"
    return JobConfig.model_validate(plain)


def fresh(job: JobConfig) -> TrainState:
    scorer = make_scorer(job, shape=(1, 4, 4), images=301)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in scorer.parameters():  # heads that start at zero would hide what comes before them
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    return TrainState.begin(job.optimizer, scorer)


def step(job: JobConfig, state: TrainState) -> StepTerms:
    return train_step(
        state.scorer, state.optimizer, torch.from_numpy(IMAGES), IDS, job=job, pixels=state.scorer.pixels, epoch=0,
        beta=1.0, learning_rate=0.01, weight=1 / 3, guard=state.guard,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", [{}, {"bound": "iwae", "samples": 3, "gradient": "dreg"}], ids=["elbo", "dreg"])
def test_bfloat16_comes_close_and_stays_inside_the_networks(family: str, objective: dict[str, Any]) -> None:
    job = job_of(family, **objective)
    state = fresh(job)
    put_out: dict[str, set[torch.dtype]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        put_out.setdefault(type(module).__name__, set()).add(output.dtype)

    layers = [module for module in state.scorer.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    terms = step(job, state)
    assert put_out
    assert set.union(*put_out.values()) == {torch.bfloat16}
    for term in terms.bound:
        assert term is None or term.dtype in (torch.float32, torch.float64)
    for name, tensor in state.tensors().items():
        assert tensor.dtype in (torch.float32, torch.int64), name

    put_out.clear()
    evaluate(state.scorer, [(IDS, IMAGES)], dims_per_image=16, config=job.likelihood, device=torch.device("cpu"))
    assert set.union(*put_out.values()) == {torch.float32}
    scored = [
        evaluate(
            state.scorer,
            [(IDS, IMAGES)],
            dims_per_image=16,
            config=job.likelihood,
            device=torch.device("cpu"),
            samples=3,
            precision=precision,
        )
        for precision in PRECISIONS
    ]
    assert set.union(*put_out.values()) == {torch.float32, torch.bfloat16}
    assert scored[0] != scored[1]
    assert scored[0].mean("negative_bound") == pytest.approx(scored[1].mean("negative_bound"), rel=0.01)
    for hook in hooks:
        hook.remove()

    wide = job_of(family, "fp32", **objective)
    exact = fresh(wide)
    exact_terms = step(wide, exact)
    assert not torch.equal(terms.objective_nats, exact_terms.objective_nats)
    torch.testing.assert_close(terms.bound.distortion, exact_terms.bound.distortion, rtol=0.02, atol=0)
    torch.testing.assert_close(terms.bound.layer_rates, exact_terms.bound.layer_rates, rtol=0.1, atol=0.05)
    # Adam's first step is the sign of the gradient: nearly all signs agree.
    agree = [(a == b).float().mean() for a, b in zip(signs(fresh(job), state), signs(fresh(wide), exact), strict=True)]
    assert torch.stack(agree).mean() > 0.9


def signs(before: TrainState, after: TrainState) -> list[Tensor]:
    return [(b - a).sign() for a, b in zip(before.scorer.parameters(), after.scorer.parameters(), strict=True)]


@pytest.mark.parametrize("name", PIXELS)
def test_likelihood_of_bfloat16_parameters_is_computed_in_float32(name: str) -> None:
    settings = {"pixels": name, "bits": 1 if name == "bernoulli" else 3, "components": 2}
    pixels = make_pixels(JOB.likelihood.model_copy(update={"binarize": "none"} | settings))
    noise = image_noise(np.arange(3), seed=0, purpose="test", device="cpu")
    levels = pixels.to_levels(torch.from_numpy(IMAGES), noise)
    chance = torch.Generator().manual_seed(0)
    narrow = torch.randn(3, pixels.parameters(1), 4, 4, generator=chance).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = pixels.log_prob(narrow, levels)
    expected = pixels.log_prob(narrow.float(), levels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, found.bfloat16().float())


def test_autocast_ends_before_the_backward_pass() -> None:
    """Gradients of float32 weights are float32, and what is said to be fp32 is not touched by it."""
    job = job_of("mlp", "fp32")
    state, plain = fresh(job), fresh(job)
    outside = step(job, state)
    assert not torch.is_autocast_enabled("cpu")
    again = step(job, plain)
    assert torch.equal(outside.objective_nats, again.objective_nats)
