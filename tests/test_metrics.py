"""Totals are exact: the same bits however the images are split, in whatever order they are added."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.test_bounds import GaussianDensity, LinearVAE, random_images
from vaejob.config import LikelihoodConfig
from vaejob.data.batches import EVALUATION_BLOCK
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO
from vaejob.metrics import LayerTotals, LikelihoodTotals, RunningTotals
from vaejob.model import VAE
from vaejob.model.gaussian import Gaussian, kl, standard_normal
from vaejob.model.noise import LATENT, Noise
from vaejob.model.vae import Inference, Layer
from vaejob.totals import OF_WEIGHTS
from vaejob.training.evaluate import LAYER_DRAWS, evaluate, layer_diagnostics

NATS = st.floats(0, 1e6, width=32) | st.floats(-50, 300, width=32)
IMAGES = st.lists(st.tuples(NATS, NATS, NATS), max_size=30)
QUANTITIES = ("distortion", "rate", "negative_bound")


def totals_of(images: list[tuple[float, float, float]], *, batch: int = 7) -> LikelihoodTotals:
    """Of rows of (distortion, rate, negative bound), added batch by batch."""
    running, rows = RunningTotals(dims_per_image=784, device="cpu"), torch.tensor(images).view(-1, 3)
    for part in rows.split(batch) if len(rows) else [rows]:
        running.add(BoundTerms(part[:, 0], part[:, 1:2]), negative_bound=part[:, 2])
    return running.to_host()


def terms_of(*distortions: float) -> BoundTerms:
    return BoundTerms(torch.tensor(distortions), torch.ones(len(distortions), 2))


def exact(nats: float) -> Fraction:
    return Fraction(round(Fraction(nats) * 2**16), 2**16)


@settings(max_examples=100, deadline=None)
@given(IMAGES, st.data())
def test_totals_do_not_depend_on_how_images_are_split(images, data):
    shuffled = data.draw(st.permutations(images))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(images)), max_size=5)))
    bounds = zip([0, *cuts], [*cuts, len(images)], strict=True)
    workers = [totals_of(shuffled[start:stop], batch=data.draw(st.integers(1, 9))) for start, stop in bounds]
    assert sum(data.draw(st.permutations(workers)), LikelihoodTotals()) == totals_of(images)


@settings(max_examples=100, deadline=None)
@given(IMAGES)
def test_sums_equal_those_of_fractions(images):
    totals = totals_of(images)
    for column, name in enumerate(QUANTITIES):
        nats = [exact(image[column]) for image in images]
        assert Fraction(getattr(totals, f"{name}_nats")) == sum(nats)
        squares = Fraction(getattr(totals, f"{name}_squares")) + Fraction(getattr(totals, f"{name}_squares_rest"))
        assert abs(squares - sum(each**2 for each in nats)) <= Fraction(len(images), 2**17)


def test_order_does_not_matter_where_plain_sums_of_squares_would_round():
    """Fifty thousand images of ten thousand nats: the squares of CIFAR-10 do not fit one float64 sum of 2^-16ths."""
    nats = 1e4 + 2e3 * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    rows = torch.stack((nats, nats / 50, nats * 1.02), dim=1)
    forward, backward = totals_of(rows.tolist(), batch=256), totals_of(rows.flip(0).tolist(), batch=1000)
    assert forward == backward
    for column, name in enumerate(QUANTITIES):
        expected = rows[:, column].double().std(correction=0).item() / math.sqrt(50_000)
        assert forward.standard_error(name) == pytest.approx(expected, rel=1e-6)


def test_the_halves_add_up_to_the_negative_elbo_exactly():
    running = RunningTotals(dims_per_image=4, device="cpu")
    generator = torch.Generator().manual_seed(0)
    running.add(BoundTerms(100 * torch.rand(999, generator=generator), 20 * torch.rand(999, 3, generator=generator)))
    totals = running.to_host()
    assert totals.negative_bound_nats == totals.distortion_nats + totals.rate_nats


def test_mean_and_standard_error_divide_once():
    totals = totals_of([(1.0, 2.0, 3.0), (2.0, 2.0, 4.0), (6.0, 2.0, 8.0)])
    assert totals.mean("distortion") == 3
    assert totals.standard_error("distortion") == pytest.approx(math.sqrt((41 / 3 - 9) / 3))
    assert (totals.mean("rate"), totals.standard_error("rate")) == (2, 0)
    assert totals.bits_per_dim == pytest.approx(5 / (784 * math.log(2)))
    assert totals.bits_per_dim_standard_error == pytest.approx(math.sqrt((89 / 3 - 25) / 3) / (784 * math.log(2)))


def test_images_count_by_their_number_and_not_by_their_worker():
    """(2 / 1 + 90 / 9) / 2 is 6.0, the mean of means; the mean is 9.2."""
    workers = [totals_of([(2.0, 0.0, 2.0)]), totals_of([(10.0, 0.0, 10.0)] * 9)]
    assert sum(workers, LikelihoodTotals()).mean("negative_bound") == 9.2


def test_no_images_have_no_mean():
    running = RunningTotals(dims_per_image=784, device="cpu")
    running.add(BoundTerms(torch.empty(0), torch.empty(0, 2)))
    assert running.to_host() == LikelihoodTotals()
    for question in (lambda t: t.mean("rate"), lambda t: t.standard_error("rate"), lambda t: t.bits_per_dim):
        with pytest.raises(ZeroDivisionError, match="no image"):
            question(LikelihoodTotals())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_likelihood_that_is_not_finite_is_counted_and_spoils_every_mean(wrong):
    running = RunningTotals(dims_per_image=784, device="cpu")
    running.add(terms_of(1.0, wrong, 3.0))
    totals = running.to_host() + totals_of([(1.0, 1.0, 2.0)])
    assert (totals.images, totals.non_finite, totals.distortion_nats, totals.rate_nats) == (4, 1, 5.0, 5.0)
    with pytest.raises(ArithmeticError, match="1 of 4 images"):
        totals.mean("rate")
    with pytest.raises(ArithmeticError, match="1 of 4 images"):
        _ = totals.bits_per_dim_standard_error


@given(IMAGES)
def test_totals_survive_json(images):
    totals = totals_of(images)
    assert LikelihoodTotals.from_dict(json.loads(json.dumps(totals.to_dict()))) == totals


def test_cleared_totals_are_empty():
    running = RunningTotals(dims_per_image=784, device="cpu")
    running.add(terms_of(1.0, 2.0))
    running.clear()
    assert running.to_host() == LikelihoodTotals()


def test_adding_never_waits_for_the_device(monkeypatch):
    """A device that is asked for a number must finish its work first; the ways to ask are taken away here."""

    def refuse(*_: object) -> None:
        raise AssertionError("the host asked the device for a value")

    running, terms = RunningTotals(dims_per_image=784, device="cpu"), terms_of(1.0, math.nan)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        running.add(terms)
    assert running.to_host().images == 2


def test_gradients_do_not_reach_into_totals():
    running = RunningTotals(dims_per_image=784, device="cpu")
    running.add(BoundTerms(torch.ones(2, requires_grad=True) * 2, torch.ones(2, 1, requires_grad=True)))
    assert running.to_host().distortion_nats == 4


WEIGHTS = st.lists(st.floats(1, 5000), max_size=30)


def weighed(samples: list[float], *, batch: int = 4) -> LikelihoodTotals:
    """Of images whose weights are worth so many samples, of 5000."""
    running, rows = RunningTotals(dims_per_image=4, device="cpu"), torch.tensor(samples, dtype=torch.float64)
    for part in rows.split(batch) if len(rows) else [rows]:
        terms = BoundTerms(torch.ones(len(part)), torch.ones(len(part), 2))
        running.add(terms, negative_bound=torch.ones(len(part)), effective_samples=part, samples=5000)
    return running.to_host()


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.data())
def test_sums_of_weights_do_not_depend_on_how_images_are_split(samples, data):
    shuffled = data.draw(st.permutations(samples))
    cut = data.draw(st.integers(0, len(samples)))
    workers = [weighed(part, batch=data.draw(st.integers(1, 9))) for part in (shuffled[:cut], shuffled[cut:])]
    assert sum(workers, LikelihoodTotals()) == weighed(samples)
    assert LikelihoodTotals.from_dict(json.loads(json.dumps(weighed(samples).to_dict()))) == weighed(samples)


def test_weights_tell_the_effective_samples_and_what_the_bound_lacks():
    told = (weighed([10.0, 40.0]) + weighed([100.0]) + weighed([])).weights()
    assert told["effective_samples"] == pytest.approx(50, abs=1e-4)
    assert told["least_effective_samples"] == 10
    lacking = (0.1 + 0.025 + 0.01) / 3 - 1 / 5000
    assert told["bound_bias_nats_estimate"] == pytest.approx(-lacking / 2, abs=1e-8)
    assert told["negative_bound_nats_sampling_error"] == pytest.approx(math.sqrt(lacking / 3), abs=1e-8)
    assert weighed([]).weights() == totals_of([(1.0, 1.0, 2.0)]).weights() == {}


def test_an_image_without_a_finite_bound_has_no_weights():
    running = RunningTotals(dims_per_image=4, device="cpu")
    ess, bound = torch.tensor([4.0, math.nan, 2.0]), torch.tensor([1.0, math.nan, 1.0])
    running.add(terms_of(1.0, 1.0, 1.0), negative_bound=bound, effective_samples=ess, samples=5)
    totals = running.to_host()
    assert (totals.weighed_images, totals.effective_samples, totals.largest_inverse_ess) == (2, 6.0, 0.5)
    running.clear()
    assert running.to_host() == LikelihoodTotals()


def test_rows_that_know_no_weights_can_be_read():
    totals = totals_of([(1.0, 2.0, 3.0)])
    old = {name: value for name, value in totals.to_dict().items() if name not in OF_WEIGHTS}
    assert LikelihoodTotals.from_dict(old) == LikelihoodTotals.from_dict(old | dict.fromkeys(OF_WEIGHTS)) == totals
    with pytest.raises(KeyError):
        LikelihoodTotals.from_dict({"images": 1})


def test_trained_bound_is_counted_where_it_is_no_sum_of_halves():
    running = RunningTotals(dims_per_image=4, device="cpu")
    running.add(BoundTerms(torch.tensor([4.0]), torch.tensor([[1.0, 2.0]]), torch.tensor([6.5])))
    totals = running.to_host()
    assert (totals.distortion_nats, totals.rate_nats, totals.negative_bound_nats) == (4.0, 3.0, 6.5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bounds_and_their_weights_do_not_depend_on_the_number_of_workers(world_size):
    """Blocks are fixed, and so is what is computed of each; any number of workers shares them out."""
    scorer, _ = random_images(0)
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    blocks = [(ids, images[ids]) for ids in np.split(np.arange(60), [9, 18, 27, 36, 45, 54])]
    settings = {"dims_per_image": 64, "config": LikelihoodConfig(pixels="bernoulli", binarize="threshold")}
    whole = evaluate(scorer, blocks, **settings, device=torch.device("cpu"), samples=40)
    parts = [
        evaluate(scorer, blocks[rank::world_size], **settings, device=torch.device("cpu"), samples=40)
        for rank in range(world_size)
    ]
    assert sum(parts, LikelihoodTotals()) == whole
    assert whole.weighed_images == 60
    weights = whole.weights()
    assert 1 <= weights["least_effective_samples"] <= weights["effective_samples"] <= 40
    assert whole.negative_bound_nats < whole.distortion_nats + whole.rate_nats
    assert evaluate(scorer, blocks, **settings, device=torch.device("cpu")).weights() == {}


# Layers.


class OneDeadUnit(LinearVAE):
    """Four pixels; the second unit knows nothing of them."""

    def encode(self, inputs: Tensor) -> Gaussian:
        mean, log_std = super().encode(inputs)
        return Gaussian(mean * torch.tensor([1.0, 0]), log_std * torch.tensor([1.0, 0]))


class ThirdLayerDead(OneDeadUnit):
    """Its second layer is drawn from the first and carries less; its third is the prior."""

    def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        (first,), parameters = super().draw(encoding, noise, samples=samples)
        second = Gaussian(first.z, torch.zeros_like(first.z))
        nothing = standard_normal(first.z)
        z2, z3 = (each.sample(noise.normal(LATENT + i, (2,))) for i, each in ((1, second), (2, nothing)))
        return Inference((first, Layer(second, nothing, z2), Layer(nothing, nothing, z3)), parameters)


def layers_of(vae: VAE, images: int, *, blocks: int = 1) -> LayerTotals:
    """By the evaluation's own path; pictures of four pixels, levels 0 to 255."""
    pictures = np.random.default_rng(0).integers(0, 256, (images, 4, 1, 1), dtype=np.uint8)
    parts = np.array_split(np.arange(images), blocks)
    scorer = NegativeELBO(vae, GreyDensity())
    return sum(
        (
            layer_diagnostics(scorer, [(ids, pictures[ids])], config=LikelihoodConfig(), device=torch.device("cpu"))
            for ids in parts
        ),
        LayerTotals(),
    )


class GreyDensity(GaussianDensity):
    def to_levels(self, images: Tensor, noise: Noise) -> Tensor:
        return images.double() / 64

    def to_inputs(self, levels: Tensor) -> Tensor:
        return levels


def test_units_that_know_nothing_of_the_image_are_not_active():
    vae, images = OneDeadUnit(), 500
    found = layers_of(vae, images)
    assert (found.images, found.units, found.active_units) == (images, [2], [1])
    pictures = np.random.default_rng(0).integers(0, 256, (images, 4, 1, 1), dtype=np.uint8)
    posterior = vae.encode(torch.from_numpy(pictures).double() / 64)
    assert found.rates[0] == pytest.approx(kl(posterior, standard_normal(posterior.mean)).mean().item(), abs=1e-4)
    variance = found.products[0] / images - (found.means[0] / images) ** 2
    np.testing.assert_allclose(variance, posterior.mean.var(0, correction=0).numpy(), atol=1e-4)
    assert found.collapsed() == []


def test_collapsed_layers_are_named():
    found = layers_of(ThirdLayerDead(), 5000)
    assert found.active_units == [1, 1, 0]
    assert found.rates[2] == 0
    (line,) = found.collapsed()
    assert re.fullmatch(
        r"stochastic layer 3 of 3 has collapsed: 0.0000 nats of rate per image, 0 of 2 units active", line
    )


@pytest.mark.parametrize(
    ("rate", "scale", "says"),
    [(0.0, 0.0, "has collapsed"), (5.5, 0.05, "may carry nothing"), (0.0, 1.0, "has collapsed"), (5.5, 1.0, None)],
)
def test_a_layer_with_a_rate_is_not_called_collapsed_for_its_small_scale(rate, scale, says):
    """The variance by which a unit counts as active is meant for codes of unit scale."""
    means = np.random.default_rng(0).normal(0, scale, (1000, 2))
    found = LayerTotals(
        images=1000,
        rate_nats=(rate * 1000, 3000.0),
        means=(means.sum(0), np.zeros(1)),
        products=((means**2).sum(0), np.full(1, 1e3)),
    )
    assert [line.split(": ")[0] for line in found.collapsed()] == ([f"stochastic layer 1 of 2 {says}"] if says else [])


def test_units_drawn_by_chance_above_a_layer_do_not_pass_for_active():
    """The second layer's mean is the first's code: its noise is not knowledge of the image."""

    class Blind(ThirdLayerDead):
        def encode(self, inputs: Tensor) -> Gaussian:
            return standard_normal(super().encode(inputs).mean)

    found = layers_of(Blind(), 20_000)
    assert found.active_units == [0, 0, 0]
    assert [line[:21] for line in found.collapsed()] == [f"stochastic layer {i} of" for i in (1, 2, 3)]


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_totals_of_layers_do_not_depend_on_how_images_are_split(blocks):
    whole, parts = layers_of(ThirdLayerDead(), 50), layers_of(ThirdLayerDead(), 50, blocks=blocks)
    assert whole.rate_nats == parts.rate_nats
    for name in ("means", "products"):
        for one, other in zip(getattr(whole, name), getattr(parts, name), strict=True):
            assert np.array_equal(one, other)


def test_no_more_codes_are_drawn_at_once_than_a_block_has_images():
    vae, drawn = OneDeadUnit(), list[int]()
    draw = vae.draw

    def counted(encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        drawn.append(len(noise.keys))
        return draw(encoding, noise, samples=samples)

    vae.draw = counted
    layers_of(vae, 500)
    assert sum(drawn) == 500 * LAYER_DRAWS
    assert max(drawn) <= EVALUATION_BLOCK


def test_no_images_have_no_layers():
    assert LayerTotals() + LayerTotals() == LayerTotals() or not (LayerTotals() + LayerTotals()).images
