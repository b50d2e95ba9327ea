"""The gradient is that of the global batch, however its images are split over ranks; schedules count images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tests.ranks import leave
from tests.test_bounds import GaussianDensity, TwoLayers, noise, pictures
from vaejob.config import ObjectiveConfig, OptimizerConfig, parse_config
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.training.schedule import beta, crosses, due, learning_rate
from vaejob.training.step import make_optimizer, make_scorer, train_step, training_noise

JOB = parse_config(
    """
run: {name: step, bucket: nowhere}
data: {train: nowhere}
model: {latent: 3, hidden: [7]}
likelihood: {pixels: bernoulli, binarize: dynamic}
optimizer: {name: adam, learning_rate: 0.01}
training: {images: 100}
"""
)
IDS = np.array([11, 5, 300])
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 4), dtype=np.uint8)


def weights_after_two_steps(
    first: int, end: int, *, world_size: int = 1, settings: dict[str, Any] | None = None, micro_batch: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of a rank that holds images [first, end) of both batches, and how many sums over the ranks there were."""
    training = JOB.training.model_copy(update={"micro_batch": micro_batch})
    job = JOB.model_copy(update={"objective": ObjectiveConfig(**settings or {}), "training": training})
    sums = 0

    def counted(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal sums
        sums += 1
        return allreduce_hook(None, bucket)

    torch.set_num_threads(1)
    scorer = make_scorer(JOB, shape=(1, 4, 4))
    model: nn.Module = scorer
    if world_size > 1:
        static = not micro_batch
        model = nn.parallel.DistributedDataParallel(scorer, gradient_as_bucket_view=True, static_graph=static)
        model.register_comm_hook(None, counted)
    optimizer = make_optimizer(JOB.optimizer, scorer)
    for epoch in range(2):
        train_step(
            model,
            optimizer,
            torch.from_numpy(IMAGES[first:end]),
            IDS[first:end],
            job=job,
            pixels=scorer.pixels,
            epoch=epoch,
            beta=0.5,
            learning_rate=0.01,
            weight=world_size / len(IDS),
        )
    return {**scorer.state_dict(), "sums": torch.tensor(sums)}


def one_rank(
    rank: int, world_size: int, folder: str, settings: dict[str, Any] | None = None, micro_batch: int = 0
) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    cuts = {2: [0, 1, 3], 5: [0, 0, 1, 2, 3, 3]}[world_size]  # unequal parts, and ranks that hold nothing
    weights = weights_after_two_steps(
        cuts[rank], cuts[rank + 1], world_size=world_size, settings=settings, micro_batch=micro_batch
    )
    torch.save(weights, Path(folder) / f"{world_size}-{rank}.pt")
    leave()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 0), (5, 0), (2, 1)])
def test_unequal_and_empty_parts_move_the_weights_like_one_rank(
    world_size: int, micro_batch: int, tmp_path: Path
) -> None:
    """In one piece or several, of which each rank may have another number: the ranks sum once a step."""
    torch.multiprocessing.spawn(one_rank, args=(world_size, str(tmp_path), None, micro_batch), nprocs=world_size)
    whole = weights_after_two_steps(0, 3)
    assert not whole.pop("sums")
    for rank in range(world_size):
        split = torch.load(tmp_path / f"{world_size}-{rank}.pt", weights_only=True)
        assert split["sums"] == 2
        for name, weight in whole.items():
            torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-6)


def test_several_codes_move_the_weights_alike_on_one_rank_or_more(tmp_path: Path) -> None:
    settings = {"bound": "iwae", "samples": 3, "gradient": "dreg"}
    torch.multiprocessing.spawn(one_rank, args=(2, str(tmp_path), settings), nprocs=2)
    whole, one_code = weights_after_two_steps(0, 3, settings=settings), weights_after_two_steps(0, 3)
    assert not torch.equal(whole["vae.output.weight"], one_code["vae.output.weight"])
    whole.pop("sums")
    for rank in range(2):
        split = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        for name, weight in whole.items():
            torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-6)


def test_gradient_in_several_layers_survives_ddp(tmp_path: Path) -> None:
    """Its derivatives by the codes are taken before DDP hears of a backward pass."""
    config = ObjectiveConfig(bound="iwae", samples=4, gradient="dreg")

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        for _ in range(2):  # DDP learns a static graph in the first pass
            model.zero_grad()
            model(pictures(), noise(5).keys, config).negative_bound.sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients(NegativeELBO(TwoLayers(), GaussianDensity()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        scorer = NegativeELBO(TwoLayers(), GaussianDensity())
        wrapped = gradients(
            nn.parallel.DistributedDataParallel(scorer, gradient_as_bucket_view=True, static_graph=True)
        )
    finally:
        torch.distributed.destroy_process_group()
    assert len(plain) == 4
    torch.testing.assert_close(wrapped, plain)


@pytest.mark.parametrize("settings", [{}, {"bound": "iwae", "samples": 3, "gradient": "dreg"}])
def test_pieces_add_up_to_the_batch(settings: dict[str, Any]) -> None:
    """Weights up to rounding, and the terms of each image in their order: its noise is its own."""
    whole = weights_after_two_steps(0, 3, settings=settings)
    for micro_batch in (1, 2, 3, 4):
        pieces = weights_after_two_steps(0, 3, settings=settings, micro_batch=micro_batch)
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    found = []
    for micro_batch in (0, 2):
        scorer, training = (
            make_scorer(JOB, shape=(1, 4, 4)),
            JOB.training.model_copy(update={"micro_batch": micro_batch}),
        )
        job = JOB.model_copy(update={"objective": ObjectiveConfig(**settings), "training": training})
        found.append(
            train_step(
                scorer, make_optimizer(job.optimizer, scorer), torch.from_numpy(IMAGES), IDS, job=job,
                pixels=scorer.pixels, epoch=0, beta=0.5, learning_rate=0.01, weight=1 / 3,
            )
        )  # fmt: skip
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["standard", "dreg"])
def test_a_step_reports_the_bound_it_trained(gradient: str) -> None:
    objective = ObjectiveConfig(bound="iwae", samples=6, gradient=gradient)
    job = JOB.model_copy(update={"objective": objective})
    scorer = make_scorer(job, shape=(1, 4, 4))
    noise = training_noise(IDS, seed=0, epoch=0, device=torch.device("cpu"))
    levels = scorer.pixels.to_levels(torch.from_numpy(IMAGES), noise)
    expected = importance_bound(scorer.vae, scorer.pixels, levels, noise, samples=6).log_likelihood
    terms = train_step(
        scorer, make_optimizer(job.optimizer, scorer), torch.from_numpy(IMAGES), IDS,
        job=job, pixels=scorer.pixels, epoch=0, beta=1.0, learning_rate=0.01, weight=1 / 3,
    )  # fmt: skip
    assert terms.bound.negative_bound is not None
    torch.testing.assert_close(terms.bound.negative_bound, -expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.objective_nats, terms.bound.negative_bound.sum())
    assert not any(term.requires_grad for term in terms.bound if term is not None)


@given(every=st.integers(1, 50), before=st.integers(0, 500), size=st.integers(1, 100))
def test_something_is_due_when_a_multiple_is_passed_or_reached(every: int, before: int, size: int) -> None:
    due = any(images % every == 0 for images in range(before + 1, before + size + 1))
    assert crosses(every, before=before, after=before + size) == due
    assert not crosses(0, before=before, after=before + size)


def test_checkpoints_and_held_out_passes_end_a_report() -> None:
    job = JOB.model_copy(
        update={
            "data": JOB.data.model_copy(update={"test": "somewhere"}),
            "training": JOB.training.model_copy(
                update={"images": 100, "report_every_images": 30, "evaluate_every_images": 40}
            ),
            "checkpoint": JOB.checkpoint.model_copy(update={"every_images": 25}),
        }
    )
    found = {after: due(job, before=after - 5, after=after) for after in range(5, 105, 5)}
    assert [after for after, now in found.items() if now.save] == [25, 50, 75, 100]
    assert [after for after, now in found.items() if now.evaluate] == [40, 80, 100]
    assert [after for after, now in found.items() if now.report] == [25, 30, 40, 50, 60, 75, 80, 90, 100]


def test_learning_rate_warms_up_and_falls_by_half_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=0.2, schedule="cosine", warmup_images=100)
    rates = [learning_rate(config, images_seen=images, images=1100) for images in (0, 49, 99, 100, 600, 850, 1100)]
    expected = [0.002, 0.1, 0.2, 0.2, 0.1, 0.1 * (1 + math.cos(0.75 * math.pi)), 0.0]
    assert rates == pytest.approx(expected, abs=1e-12)
    constant = OptimizerConfig(learning_rate=0.2)
    assert {learning_rate(constant, images_seen=images, images=1100) for images in (0, 500, 1099)} == {0.2}


@pytest.mark.parametrize("images", [3280 * 60_000, 3280, 1000, 7])
def test_staged_learning_rate_is_that_of_the_iwae_paper(images: int) -> None:
    """Stage i of 0..7 lasts 3^i passes of 3280, at 10^(-i/7) of the rate."""
    config = OptimizerConfig(learning_rate=1e-3, schedule="staged")
    passes = [stage for stage in range(8) for _ in range(3**stage)]
    assert len(passes) == 3280
    for part in (0, 1, 3, 4, 12, 13, 39, 40, 1092, 1093, 2000, 3279):
        first = -(-part * images // 3280)  # the first image of this part
        if first * 3280 < (part + 1) * images:
            found = learning_rate(config, images_seen=first, images=images)
            assert found == pytest.approx(1e-3 * 10 ** (-passes[part] / 7), rel=1e-12)
    rounded = [1e-3, 7.2e-4, 5.2e-4, 3.7e-4, 2.7e-4, 1.9e-4, 1.4e-4, 1e-4]  # as the authors' code has them
    starts = [(3**stage - 1) // 2 * images for stage in range(8)]
    found = [learning_rate(config, images_seen=-(-start // 3280), images=images) for start in starts]
    if images >= 3280:
        assert found == pytest.approx(rounded, rel=0.02)


def test_rate_is_weighed_in_over_the_warm_up() -> None:
    config = ObjectiveConfig(kl_warmup_images=400)
    assert [beta(config, images_seen=images) for images in (0, 100, 400, 9999)] == [0.0, 0.25, 1.0, 1.0]
    assert beta(ObjectiveConfig(), images_seen=0) == 1.0


@pytest.mark.parametrize("name", ["adam", "adamw", "adamax"])
def test_optimisers_move_as_their_paper_says(name: str) -> None:
    """Two steps by hand, with settings that are no defaults."""
    settings = {"name": name, "learning_rate": 0.1, "beta1": 0.8, "beta2": 0.6, "epsilon": 0.05}
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float32))
    optimizer = make_optimizer(OptimizerConfig(**settings), nn.ParameterList([weight]))
    w, m, v, u = 2.0, 0.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -2.0), start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.6 * v + 0.4 * gradient**2
        u = max(0.6 * u, abs(gradient) + 0.05)
        away = u if name == "adamax" else math.sqrt(v / (1 - 0.6**step)) + 0.05
        w -= 0.1 * m / (1 - 0.8**step) / away
        assert weight.item() == pytest.approx(w, rel=1e-5)
