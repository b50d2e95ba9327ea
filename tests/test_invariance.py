"""A trained model's held-out numbers: bit for bit the same for any number of workers, and to the last printed digit for
any batch and any chunk of draws.

What is bitwise: draws of noise, the sums over images and over weights, and the totals of any split of the fixed blocks of
256 images over workers. What is not: a network's matrix products, whose rounding may change with the number of rows, so
that an image may differ by some 1e-5 nats in another batch. No user can set a batch for evaluation, nor a chunk.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import vaejob
from vaejob.cli.overview import likelihood_numbers
from vaejob.config import Precision
from vaejob.data.batches import DataSet
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.likelihood.bounds import importance_bound
from vaejob.loaded import LoadedModel
from vaejob.metrics import LikelihoodTotals
from vaejob.training.evaluate import Blocks, evaluate
from vaejob.training.step import evaluation_noise

DRAWS = 50
PRINTED = {"nats": 4, "bits_per_dim": 5}
"""Digits behind the point that `vaejob evaluate` prints."""
FAMILIES = {
    "mlp": ["model.hidden=[32]", "training.images=20000"],
    "two-layers": [
        "model.hidden=[16]", "model.upper_latent=4", "model.upper_hidden=[16]", "model.activation=tanh",
        "training.images=12800",
    ],
    "conv": ["model.family=conv", "model.channels=[8,8]", "training.images=6400"],
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    images = (load_digits().images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images), str(folder), split="train=0.5,test=0.5")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, digits: Path) -> tuple[LoadedModel, DataSet]:
    """A hundred steps or more of 64 images, and 899 held-out images."""
    run = vaejob.train(
        vaejob.load_config(
            "quickstart", f"run.bucket={digits}/runs", f"run.name={request.param}", f"data.train={digits}/train",
            f"data.test={digits}/test", "model.latent=8", "cluster.workers=0", *FAMILIES[request.param],
        )
    )  # fmt: skip
    return vaejob.load(run), vaejob.open_data(f"{digits}/test")


def printed(totals: LikelihoodTotals, model: LoadedModel) -> dict[str, str]:
    """As `vaejob evaluate` prints them."""
    found = {}
    for name, value in likelihood_numbers(totals, model.job.likelihood).items():
        unit = next((unit for unit in PRINTED if unit in name), None)
        found[name] = f"{value:.{PRINTED[unit]}f}" if unit else str(value)
    return found


@pytest.mark.parametrize(("samples", "precision"), [(1, "fp32"), (20, "fp32"), (20, "bf16")])
def test_any_number_of_workers_gives_the_same_bits(
    trained: tuple[LoadedModel, DataSet], samples: int, precision: Precision
) -> None:
    model, data = trained
    whole = model.evaluate(data, samples=samples, precision=precision)
    assert whole.images == data.manifest.images
    for world_size in (2, 3, 5):
        ranks = range(world_size)
        parts = [
            model.evaluate(data, samples=samples, precision=precision, rank=rank, world_size=world_size)
            for rank in ranks
        ]
        assert sum(parts, LikelihoodTotals()) == whole
        assert sum(reversed(parts), LikelihoodTotals()) == whole


def blocks_of(data: DataSet, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ids = np.arange(data.manifest.images)
    images = data.images(ids)
    for start in range(0, len(ids), size):
        yield ids[start : start + size], images[start : start + size]


def scored(model: LoadedModel, data: DataSet, blocks: Blocks, *, samples: int) -> LikelihoodTotals:
    dims, config = data.manifest.dims, model.job.likelihood
    return evaluate(
        model.scorer, blocks, dims_per_image=dims, config=config, device=torch.device("cpu"), samples=samples
    )


@pytest.mark.parametrize("samples", [1, 20])
def test_any_size_of_batch_gives_the_same_printed_digits(trained: tuple[LoadedModel, DataSet], samples: int) -> None:
    model, data = trained
    whole = model.evaluate(data, samples=samples)
    for size in (7, 64, 256, 900) if samples > 1 else (1, 7, 64, 256, 900):
        found = scored(model, data, blocks_of(data, size), samples=samples)
        assert found.images == whole.images
        # A tenth of the last printed digit; 256 is the size that the product uses.
        assert abs(found.mean("negative_bound") - whole.mean("negative_bound")) < (1e-5 if size != 256 else 1e-300)
        assert printed(found, model) == printed(whole, model)


def test_any_chunk_of_draws_gives_the_same_printed_digits(trained: tuple[LoadedModel, DataSet]) -> None:
    model, data = trained
    ids, images = next(blocks_of(data, 64))
    levels, noise = torch.from_numpy(images) >> 4, evaluation_noise(ids, device=torch.device("cpu"))
    pixels, vae = model.scorer.pixels, model.scorer.vae
    whole = importance_bound(vae, pixels, levels, noise, samples=DRAWS)
    for chunk in (1, 3, DRAWS, 10 * DRAWS):
        found = importance_bound(vae, pixels, levels, noise, samples=DRAWS, chunk=chunk)
        assert (found.log_likelihood - whole.log_likelihood).abs().max() < 1e-4
        assert abs((found.log_likelihood - whole.log_likelihood).mean()) < 1e-5
        assert f"{found.log_likelihood.mean():.4f}" == f"{whole.log_likelihood.mean():.4f}"
        assert f"{found.effective_samples.mean():.1f}" == f"{whole.effective_samples.mean():.1f}"
    again = importance_bound(vae, pixels, levels, noise, samples=DRAWS)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@settings(max_examples=8)
@given(given_blocks=st.data())
def test_any_order_and_any_split_gives_the_same_printed_digits(
    trained: tuple[LoadedModel, DataSet], given_blocks: st.DataObject
) -> None:
    """Blocks of drawn sizes, in a drawn order, shared out to drawn workers."""
    model, data = trained
    whole, images = model.evaluate(data), data.images(np.arange(data.manifest.images))
    cuts = given_blocks.draw(st.lists(st.integers(1, len(images) - 1), max_size=6, unique=True))
    order = np.random.default_rng(given_blocks.draw(st.integers(0, 99))).permutation(len(images))
    parts = np.split(order, sorted(cuts))
    found = sum(
        (scored(model, data, [(np.sort(part), images[np.sort(part)])], samples=1) for part in parts), LikelihoodTotals()
    )
    assert found.images == whole.images
    assert abs(found.mean("negative_bound") - whole.mean("negative_bound")) < 1e-5
    assert printed(found, model) == printed(whole, model)
