"""Totals are exact: the same bits however the images are split, in whatever order they are added."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaejob.likelihood.bounds import BoundTerms
from vaejob.metrics import LikelihoodTotals, RunningTotals

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
