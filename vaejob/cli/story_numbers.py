"""The story's numbers: each model scored on the same images with the same noise, and what follows from comparing them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from vaejob.cli.terminal import CONDITIONAL
from vaejob.data.batches import DataSet
from vaejob.errors import RunError
from vaejob.likelihood.bounds import ONE_CODE, BoundTerms, importance_bound
from vaejob.loaded import LoadedModel
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.model.noise import Noise
from vaejob.training.step import draw_levels, evaluation_noise

FEW_EFFECTIVE_SAMPLES = 10


class Score(NamedTuple):
    """The likelihood of a data set's images under one model."""

    totals: LikelihoodTotals
    nats: NDArray[np.float64]
    """[images] what the totals sum up, of each image by its id: differences between models are of the same images."""

    @property
    def useless_weights(self) -> bool:
        """Whether a bound by importance weights may be far above -log p(x)."""
        weights = self.totals.weights()
        return bool(weights) and weights["effective_samples"] < FEW_EFFECTIVE_SAMPLES


class Difference(NamedTuple):
    """One model less another, in nats per image."""

    nats: float
    standard_error: float

    @property
    def is_chance(self) -> bool:
        """Whether it is within two standard errors of none."""
        return abs(self.nats) <= 2 * self.standard_error

    def __str__(self) -> str:
        return f"{self.nats:+.3f} ± {self.standard_error:.3f}"


class Told(NamedTuple):
    """One row of the table."""

    title: str
    run: str
    checkpoint: int | None
    parameters: int
    own_codes: bool
    """Whether train is given a code of each image's own, so that it is no bound."""
    train: Score
    test: Score
    marginal: Score | None
    """The IWAE bound; the closed form has none, as it is the marginal."""

    def to_dict(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {name: getattr(self, name) for name in ("title", "run", "checkpoint", "parameters")}
        for name in ("train", "test", "marginal"):
            score: Score | None = getattr(self, name)
            if score is not None:
                numbers[name] = {"is": self.what_it_is(name), **_numbers(score)}
        return numbers

    def what_it_is(self, name: str) -> str:
        if self.marginal is None:
            return "-log p(x)"
        if name == "train" and self.own_codes:
            return f"-log p(x | z), {CONDITIONAL}"
        return "-IWAE bound" if name == "marginal" else "-ELBO"


class Finding(NamedTuple):
    """What two rows of the table say together."""

    of: str
    differences: dict[str, Difference]
    text: str

    def to_dict(self) -> dict[str, Any]:
        nats = {
            name: {"nats": found.nats, "standard_error": found.standard_error}
            for name, found in self.differences.items()
        }
        return {"of": self.of, **nats, "text": self.text}


def score(model: LoadedModel, data: DataSet, *, samples: int = 1, own_codes: bool = False) -> Score:
    """-ELBO with one code, -IWAE bound with several; given the code that belongs to each image, -log p(x | z)."""
    totals, each = RunningTotals(dims_per_image=data.manifest.dims, device=model.device), []
    with torch.no_grad():
        for levels, noise, ids in _levels(model, data):
            terms = model.scorer(levels, noise.keys, ONE_CODE, ids if own_codes else None)
            if samples == 1:
                totals.add(terms)
                each.append(terms.distortion.double() + terms.rate.double())
                continue
            bound, effective = importance_bound(model.scorer.vae, model.scorer.pixels, levels, noise, samples=samples)
            totals.add(terms, negative_bound=-bound, effective_samples=effective, samples=samples)
            each.append(-bound)
    return _checked(model.address, totals.to_host(), each)


def factorised_marginal(model: LoadedModel, train: DataSet, *data: DataSet) -> list[Score]:
    """-log p(x) of data's images where each pixel is one with the probability (n1 + 1/2) / (n + 1): n1 of the n training images.

    Half an image of either kind (Krichevsky and Trofimov) keeps pixels possible that never changed. The model lends its
    binary pixels.
    """
    pixels = model.scorer.pixels
    ones, images = torch.zeros(train.manifest.shape, dtype=torch.float64, device=model.device), 0
    for levels, _, _ in _levels(model, train):
        ones += levels.sum(0, dtype=torch.float64)
        images += len(levels)
    logits = ((ones + 0.5) / (images + 1)).logit()
    scores = []
    for one in data:
        totals, each = RunningTotals(dims_per_image=one.manifest.dims, device=model.device), []
        for levels, _, _ in _levels(model, one):
            nats = -pixels.log_prob(logits.expand(len(levels), *logits.shape), levels)
            totals.add(BoundTerms(nats, torch.zeros_like(nats)[:, None]))
            each.append(nats.double())
        scores.append(_checked("the factorised marginal", totals.to_host(), each))
    return scores


def difference(one: Score, other: Score) -> Difference:
    """Of the same images, with the standard error of the mean of their differences."""
    each = one.nats - other.nats
    return Difference(float(each.mean()), float(each.std() / math.sqrt(len(each))))


def findings(rows: Mapping[str, Told]) -> list[Finding]:
    """What the table shows, each sentence from its numbers; the rows by their recipes' names, and closed-form."""
    return [
        _marginal(rows["closed-form"], rows["story-marginal"]),
        _random_pairing(rows["closed-form"], rows["story-random-pairing"]),
        _memory("fixed-code", "Fixed codes", rows["closed-form"], rows["story-fixed-code"]),
        _memory("latent-table", "Learnt codes", rows["closed-form"], rows["story-latent-table"]),
        _encoder(rows),
        _tying(rows["story-vae"], rows["story-tied"]),
    ]


def _marginal(closed: Told, trained: Told) -> Finding:
    apart = difference(trained.test, closed.test)
    text = f"The marginal as it was trained differs from its closed form by {apart} nats on the test images."
    return Finding("marginal", {"test": apart}, text)


def _random_pairing(closed: Told, row: Told) -> Finding:
    apart = {"train": difference(row.train, closed.train), "test": difference(row.test, closed.test)}
    lands = not any(_matters(found, getattr(closed, of)) for of, found in apart.items())
    verdict = "lands on" if lands else "is not on"
    numbers = f"{apart['train']} nats on the training images, {apart['test']} on the test images"
    return Finding("random-pairing", apart, f"Random pairing {verdict} the factorised marginal: {numbers}.")


def _memory(of: str, who: str, closed: Told, row: Told) -> Finding:
    assert row.marginal is not None
    apart = {
        "train": difference(row.train, closed.train),
        "test": difference(row.test, closed.test),
        "marginal": difference(row.marginal, closed.test),
    }
    learnt = apart["train"].nats < 0 and _matters(apart["train"], closed.train)
    worse = apart["test"].nats > 0 and _matters(apart["test"], closed.test)
    match (learnt, worse):
        case (True, True):
            verdict = "memorise"
        case (True, False):
            verdict = "fit their images, and a fresh one fits test images no worse than the marginal"
        case _:
            verdict = "do not fit their images yet"
    text = (
        f"{who} {verdict}. To the factorised marginal: {apart['train']} nats for training images given their own codes; "
        f"{apart['test']} for test images given one fresh code, {apart['marginal']} by the -IWAE bound over many"
        f"{_worth(row)}."
    )
    return Finding(of, apart, text)


def _encoder(rows: Mapping[str, Told]) -> Finding:
    vae = rows["story-vae"]
    without = [row for name, row in rows.items() if name not in ("closed-form", "story-vae", "story-tied")]
    by_elbo = min(without, key=lambda row: row.test.totals.mean("negative_bound"))
    by_weights = min(without, key=lambda row: row.marginal.totals.mean("negative_bound") if row.marginal else math.inf)
    assert vae.marginal is not None
    assert by_weights.marginal is not None
    apart = {
        "test": difference(by_elbo.test, vae.test),
        "marginal": difference(by_weights.marginal, vae.marginal),
    }
    gains = all(one.nats > 0 and _matters(one, vae.test) for one in apart.values())
    text = (
        f"The encoder {'closes the loop' if gains else 'gains nothing yet'}: on test images the best without one is "
        f"{apart['test']} nats from it by the -ELBO ({by_elbo.title}), {apart['marginal']} by the -IWAE bound "
        f"({by_weights.title}{_worth(by_weights)})."
    )
    return Finding("encoder", apart, text)


def _matters(apart: Difference, of: Score) -> bool:
    """Whether it is more than chance, and than a hundredth of what it is a difference of."""
    return not apart.is_chance and abs(apart.nats) > 0.01 * of.totals.mean("negative_bound")


def _worth(row: Told) -> str:
    """A warning beside a bound that says little of log p(x)."""
    assert row.marginal is not None
    if not row.marginal.useless_weights:
        return ""
    return f", worth {row.marginal.totals.weights()['effective_samples']:.1f} codes alone"


def _tying(vae: Told, tied: Told) -> Finding:
    assert vae.marginal is not None
    assert tied.marginal is not None
    apart = {"test": difference(tied.test, vae.test), "marginal": difference(tied.marginal, vae.marginal)}
    saved = 1 - tied.parameters / vae.parameters
    verdict = ", within two standard errors of none" if apart["marginal"].is_chance else ""
    text = (
        f"Tying saves {saved:.0%} of the VAE's parameters; the -ELBO of test images changes by {apart['test']} nats, the "
        f"-IWAE bound by {apart['marginal']}{verdict}."
    )
    return Finding("tying", apart, text)


def _levels(model: LoadedModel, data: DataSet) -> Iterator[tuple[UInt8[Tensor, "B C H W"], Noise, Int64[Tensor, " B"]]]:
    """Block by block: what is modelled of each image, its noise, and its id."""
    for ids, images in data.evaluation_blocks():
        noise = evaluation_noise(ids, device=model.device)
        on_device = torch.from_numpy(images).to(model.device)
        pixels, config = model.scorer.pixels, model.job.likelihood
        levels = draw_levels(on_device, ids, pixels=pixels, config=config, noise=noise)
        yield levels, noise, torch.tensor(ids, device=model.device)


def _checked(who: str, totals: LikelihoodTotals, each: list[Tensor]) -> Score:
    if totals.non_finite:
        raise RunError(
            f"the bound of {totals.non_finite} of {totals.images} images is not finite under {who}; "
            "remove that run and train it anew with a lower optimizer.learning_rate"
        )
    return Score(totals, torch.cat(each).cpu().numpy())


def _numbers(found: Score) -> dict[str, Any]:
    numbers = {
        "nats": found.totals.mean("negative_bound"),
        "standard_error": found.totals.standard_error("negative_bound"),
        "bits_per_dim": found.totals.bits_per_dim,
        "images": found.totals.images,
    }
    return {**numbers, **found.totals.weights()}
