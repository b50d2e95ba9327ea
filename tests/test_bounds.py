"""Bounds against a linear-Gaussian model whose log p(x), ELBO and K-sample bounds are known in closed form."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vaejob.config import ModelConfig, ObjectiveConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, combine_weights, importance_bound, objective
from vaejob.likelihood.pixels import Bernoulli
from vaejob.metrics import RunningTotals
from vaejob.model import VAE, build_model
from vaejob.model.gaussian import Gaussian, gaussian, kl, standard_normal
from vaejob.model.noise import LATENT, Noise, image_noise
from vaejob.model.vae import Inference, Layer

# z ~ N(0, I_2), x | z ~ N(mu + W z, s2 I_4); the columns of W are orthogonal, so the posterior is diagonal.
W = torch.tensor([[2.0, 0], [0, 1], [1, 0], [0, -1]], dtype=torch.float64)
MU = torch.tensor([0.5, -0.25, 0, 1], dtype=torch.float64)
S2 = 0.5
POSTERIOR_VARIANCE = torch.tensor([1 / 11, 1 / 5], dtype=torch.float64)

X = torch.tensor(
    [[0.5, -0.25, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [-2, 0.5, 3, -1], [3, -2, 1, 2.5]], dtype=torch.float64
)
LOG_P = torch.tensor([-4.2931263643, -5.7533536370, -4.7988081825, -20.3533536370, -6.0851718189], dtype=torch.float64)

# Encoders wrong in the first code: its mean off by `shift`, its variance times `rho`.
ENCODERS = {"A": (0.0, 1.0), "B": (0.2, 2.0), "C": (-0.1, 0.75), "D": (0.0, 0.4)}
# E[K-sample bound] - log p(x) by one-dimensional quadrature; K = 1 is the ELBO.
GAPS = {
    "B": {1: -0.373426410, 2: -0.126521692, 5: -0.038617457, 10: -0.017953646, 50: -0.003411760},
    "C": {1: -0.073841036, 2: -0.046738520, 5: -0.023374708, 10: -0.013102515, 50: -0.003018014},
    "D": {1: -0.158145366, 2: -0.117367454, 5: -0.074681750, 10: -0.051139237, 50: -0.019406519},
}


class LinearVAE(VAE):
    """The linear-Gaussian model, in the precision it is given."""

    latent_shape = (2,)

    def __init__(self, encoder: str = "A", *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        shift, rho = ENCODERS[encoder]
        self.dtype = dtype
        self.shift = torch.tensor([shift, 0], dtype=dtype)
        self.log_std = (POSTERIOR_VARIANCE * torch.tensor([rho, 1], dtype=torch.float64)).log().to(dtype) / 2

    def encode(self, inputs: Tensor) -> Gaussian:
        mean = (inputs.flatten(1) - MU.to(self.dtype)) @ (W * POSTERIOR_VARIANCE / S2).to(self.dtype) + self.shift
        return gaussian(mean, self.log_std.expand_as(mean))

    def decode(self, z: Tensor) -> Tensor:
        return (MU.to(self.dtype) + z @ W.T.to(self.dtype))[:, :, None, None]


class GaussianDensity(Bernoulli):
    """x | z ~ N(parameters, S2); Bernoulli lends what no bound asks for."""

    def to_inputs(self, levels: Tensor) -> Tensor:
        return levels

    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        return -((levels - parameters).square() / S2 + math.log(2 * math.pi * S2)).flatten(1).sum(1) / 2


def noise(images: int, *, purpose: str = "evaluate") -> Noise:
    return image_noise(np.arange(images), seed=0, purpose=purpose, device="cpu")


def pictures(copies: int = 1, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return X.to(dtype).repeat(copies, 1)[:, :, None, None]


def log_p(x: Tensor) -> Tensor:
    density = torch.distributions.MultivariateNormal(MU, W @ W.T + S2 * torch.eye(4, dtype=torch.float64))
    return density.log_prob(x.double().flatten(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("samples", [1, 7, 64])
def test_exact_posterior_gives_log_p_with_any_number_of_samples(dtype, tolerance, samples):
    vae, x = LinearVAE(dtype=dtype), pictures(dtype=dtype)
    bound = importance_bound(vae, GaussianDensity(), x, noise(5), samples=samples, chunk=10)
    torch.testing.assert_close(bound.log_likelihood, LOG_P, rtol=0, atol=tolerance)
    torch.testing.assert_close(bound.effective_samples, torch.full_like(LOG_P, samples), rtol=1e-5, atol=0)


def test_exact_posterior_gives_an_elbo_of_log_p_on_average():
    """One z is drawn, but the rate is in closed form: the ELBO varies, and its mean is log p(x)."""
    copies = 20_000
    terms = NegativeELBO(LinearVAE(), GaussianDensity())(pictures(copies), noise(5 * copies).keys)
    gap = (-terms.distortion - terms.rate - LOG_P.repeat(copies)).view(copies, 5)
    assert (gap.mean(0).abs() < 4 * gap.std(0) / math.sqrt(copies)).all()


def test_large_values_neither_overflow_nor_lose_the_bound():
    x = 100 * pictures()
    assert log_p(x).min() < -1e4
    bound = importance_bound(LinearVAE(), GaussianDensity(), x, noise(5), samples=20)
    torch.testing.assert_close(bound.log_likelihood, log_p(x), rtol=1e-10, atol=0)


@pytest.mark.parametrize("samples", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("encoder", GAPS)
def test_wrong_encoders_lose_exactly_what_theory_says(encoder, samples):
    copies = 4000
    vae, x = LinearVAE(encoder), pictures(copies)
    found = importance_bound(vae, GaussianDensity(), x, noise(5 * copies), samples=samples).log_likelihood
    gap = found - LOG_P.repeat(copies)
    assert abs(gap.mean() - GAPS[encoder][samples]) < 4 * gap.std() / math.sqrt(len(gap))


@pytest.mark.parametrize("encoder", GAPS)
def test_elbo_of_wrong_encoders_is_below_by_the_divergence(encoder):
    copies = 20_000
    terms = NegativeELBO(LinearVAE(encoder), GaussianDensity())(pictures(copies), noise(5 * copies).keys)
    gap = -terms.distortion - terms.rate - LOG_P.repeat(copies)
    assert abs(gap.mean() - GAPS[encoder][1]) < 4 * gap.std() / math.sqrt(len(gap))


@pytest.mark.parametrize("chunk", [1, 3, 16, 99])
def test_chunks_change_neither_draws_nor_bound(chunk):
    vae, pixels, x, draws = LinearVAE("D"), GaussianDensity(), pictures(), noise(5)
    posterior = vae.encode(x)
    log_w = []
    for k in range(23):
        z = posterior.sample(draws.fold(k).normal(LATENT, (2,)))
        prior = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
        q = torch.distributions.Normal(posterior.mean, posterior.log_std.exp()).log_prob(z).sum(1)
        log_w.append(pixels.log_prob(vae.decode(z), x) + prior - q)
    expected, w = torch.stack(log_w).logsumexp(0) - math.log(23), torch.stack(log_w).softmax(0)
    found = importance_bound(vae, pixels, x, draws, samples=23, chunk=chunk)
    torch.testing.assert_close(found.log_likelihood, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.effective_samples, 1 / w.square().sum(0), rtol=1e-10, atol=0)


def random_images(images: int) -> tuple[NegativeELBO, Tensor]:
    vae = build_model(ModelConfig(latent=6, hidden=[20]), shape=(1, 8, 8), output_planes=1, seed=1)
    levels = (noise(images).uniform(0, (1, 8, 8)) < 0.3).to(torch.uint8)
    return NegativeELBO(vae, Bernoulli()), levels


def test_more_samples_tighten_the_bound():
    scorer, levels = random_images(400)
    terms = scorer(levels, noise(400).keys)
    bounds = [(-terms.distortion - terms.rate).mean().item()] + [
        importance_bound(scorer.vae, scorer.pixels, levels, noise(400), samples=k).log_likelihood.mean().item()
        for k in (5, 50)
    ]
    assert bounds == sorted(bounds)


def test_an_image_scores_the_same_in_any_company():
    scorer, levels = random_images(12)
    keys, some = noise(12).keys, torch.tensor([7, 2, 11])
    whole, part = scorer(levels, keys), scorer(levels[some], keys[some])
    torch.testing.assert_close(part.distortion, whole.distortion[some])
    torch.testing.assert_close(part.layer_rates, whole.layer_rates[some])
    bounds = [importance_bound(scorer.vae, scorer.pixels, levels[i], Noise(keys[i]), samples=9) for i in (..., some)]
    torch.testing.assert_close(bounds[1].log_likelihood, bounds[0].log_likelihood[some])


def test_no_images_have_no_bound_and_no_gradient():
    scorer, levels = random_images(0)
    terms = scorer(levels, noise(0).keys)
    objective(terms, beta=1.0, free_bits_nats=0.5).sum().backward()
    assert terms.distortion.shape == terms.rate.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())
    assert importance_bound(scorer.vae, scorer.pixels, levels, noise(0), samples=3).log_likelihood.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_are_float32_under_autocast(dtype):
    scorer, levels = random_images(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        terms = scorer(levels, noise(3).keys)
    assert terms.distortion.dtype == terms.rate.dtype == torch.float32


def test_objective_weighs_each_layer_above_its_free_bits():
    terms = BoundTerms(torch.tensor([10.0, 20.0]), torch.tensor([[0.2, 3.0], [1.0, 0.0]], requires_grad=True))
    assert torch.equal(terms.rate, terms.layer_rates.sum(1))
    torch.testing.assert_close(objective(terms, beta=1.0, free_bits_nats=0.0), terms.distortion + terms.rate)
    # A rate known by its sample alone may be negative, and is part of the ELBO as it is.
    sampled = BoundTerms(torch.tensor([1.0]), torch.tensor([[2.0, -0.5]]))
    assert objective(sampled, beta=1.0, free_bits_nats=0.0).item() == 2.5
    found = objective(terms, beta=0.5, free_bits_nats=0.5)
    torch.testing.assert_close(found, torch.tensor([10 + 0.5 * (0.5 + 3), 20 + 0.5 * (1 + 0.5)]))
    (gradient,) = torch.autograd.grad(found.sum(), terms.layer_rates)
    assert gradient.tolist() == [[0, 0.5], [0.5, 0]]


def test_divergence_and_density_equal_those_of_torch():
    means, log_stds = torch.randn(2, 2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    q, p = (Gaussian(mean, log_std) for mean, log_std in zip(means, log_stds, strict=True))
    theirs = [torch.distributions.Normal(each.mean, each.log_std.exp()) for each in (q, p)]
    torch.testing.assert_close(kl(q, p), torch.distributions.kl_divergence(*theirs).sum((1, 2)))
    torch.testing.assert_close(q.log_prob(p.mean), theirs[0].log_prob(p.mean).sum((1, 2)))
    assert kl(q, q).abs().max() < 1e-5


# Var w / (E w)^2, which K / ESS - 1 comes to with many samples; it is infinite for encoder D.
CHI_SQUARED = {"B": 0.337106, "C": 0.321664}


@pytest.mark.parametrize("encoder", GAPS)
def test_spread_of_log_weights_is_what_theory_says(encoder):
    copies, (shift, rho) = 20_000, ENCODERS[encoder]
    vae, x = LinearVAE(encoder), pictures(copies)
    log_w = importance_bound(vae, GaussianDensity(), x, noise(5 * copies), samples=1).log_likelihood
    log_w = log_w - LOG_P.repeat(copies)
    squares = (log_w - log_w.mean()).square()
    expected = shift**2 / POSTERIOR_VARIANCE[0] * rho + (1 - rho) ** 2 / 2
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(len(squares))


@pytest.mark.parametrize("encoder", CHI_SQUARED)
def test_effective_samples_and_the_bias_told_from_them_are_those_of_theory(encoder):
    copies, samples = 200, 1000
    bound = importance_bound(
        LinearVAE(encoder), GaussianDensity(), pictures(copies), noise(5 * copies), samples=samples
    )
    found = samples / bound.effective_samples - 1
    # The sample's chi^2 falls short of the true one by a share of about 1 / samples.
    assert abs(found.mean() - CHI_SQUARED[encoder]) < 4 * found.std() / math.sqrt(len(found)) + 10 / samples
    bias = -(1 / bound.effective_samples - 1 / samples).mean() / 2
    assert bias.item() == pytest.approx({"B": -0.000168653, "C": -0.000160068}[encoder], rel=0.1)


@pytest.mark.parametrize("encoder", GAPS)
def test_bounds_are_in_their_order_below_log_p(encoder):
    copies = 4000
    vae, x = LinearVAE(encoder), pictures(copies)
    keys = noise(5 * copies)
    terms = NegativeELBO(vae, GaussianDensity())(x, keys.keys)
    bounds = [-terms.distortion - terms.rate]
    bounds += [importance_bound(vae, GaussianDensity(), x, keys, samples=k).log_likelihood for k in (2, 5, 10, 50)]
    bounds.append(LOG_P.repeat(copies))
    for lower, higher in itertools.pairwise(bounds):
        gap = higher - lower
        assert gap.mean() > -4 * gap.std() / math.sqrt(len(gap))
    assert (bounds[-1] - bounds[0]).mean() > 0.05


def test_bound_of_divergences_in_closed_form_would_be_above_log_p():
    """What makes the sampled densities necessary: with KL inside the logarithm of the mean, no bound is left."""
    copies, samples = 4000, 50
    vae, pixels, x = LinearVAE("B"), GaussianDensity(), pictures(copies)
    inference = vae.draw(vae.encode(x), noise(5 * copies).folds(range(samples)), samples=samples)
    (layer,) = inference.layers
    wrong = pixels.log_prob(inference.parameters, x.repeat(samples, 1, 1, 1)) - kl(layer.posterior, layer.prior)
    wrong = wrong.view(samples, -1).logsumexp(0) - math.log(samples) - LOG_P.repeat(copies)
    right = importance_bound(vae, pixels, x, noise(5 * copies), samples=samples).log_likelihood - LOG_P.repeat(copies)
    assert wrong.mean() > 0.1 > right.mean() + 4 * right.std() / math.sqrt(len(right))


@pytest.mark.parametrize("chunk", [None, 1, 5, 8, 16, 99])
@pytest.mark.parametrize("samples", [1, 8, 23])
def test_as_many_codes_are_drawn_as_were_asked_for(chunk, samples):
    drawn: list[Tensor] = []

    class Spy(LinearVAE):
        def decode(self, z: Tensor) -> Tensor:
            drawn.append(z)
            return super().decode(z)

    importance_bound(Spy("B"), GaussianDensity(), pictures(), noise(5), samples=samples, chunk=chunk)
    assert sum(map(len, drawn)) == 5 * samples
    assert len(torch.cat(drawn).unique(dim=0)) == 5 * samples


def test_weights_add_up_to_the_same_bits_in_any_order_and_company():
    log_w = -1000 + 30 * torch.randn(5000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = combine_weights(log_w)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    for found in (combine_weights(log_w[order]), *(combine_weights(log_w[order, i : i + 1]) for i in range(7))):
        many = len(found.log_likelihood) == 7
        for part, all_of_it in zip(found, whole, strict=True):
            assert torch.equal(part, all_of_it) if many else (part == all_of_it).any()
    torch.testing.assert_close(whole.log_likelihood, log_w.logsumexp(0) - math.log(5000), rtol=1e-14, atol=0)
    w = log_w.softmax(0)
    torch.testing.assert_close(whole.effective_samples, 1 / w.square().sum(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_leave_no_finite_bound(wrong):
    log_w = torch.zeros(3, 2, dtype=torch.float64)
    log_w[:, 1] = wrong
    assert combine_weights(log_w).log_likelihood.isfinite().tolist() == [True, False]


def test_images_in_groups_have_the_bound_of_images_together(monkeypatch):
    scorer, levels = random_images(11)
    whole = importance_bound(scorer.vae, scorer.pixels, levels, noise(11), samples=20)
    monkeypatch.setattr("vaejob.likelihood.bounds.WEIGHT_BYTES", 3 * 8 * 20)
    parts = importance_bound(scorer.vae, scorer.pixels, levels, noise(11), samples=20)
    torch.testing.assert_close(parts.log_likelihood, whole.log_likelihood, rtol=0, atol=1e-4)
    torch.testing.assert_close(parts.effective_samples, whole.effective_samples, rtol=1e-3, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_change_a_bound_in_float32_by_its_last_bits_alone(chunk):
    scorer, levels = random_images(20)
    whole = importance_bound(scorer.vae, scorer.pixels, levels, noise(20), samples=50).log_likelihood
    found = importance_bound(scorer.vae, scorer.pixels, levels, noise(20), samples=50, chunk=chunk).log_likelihood
    torch.testing.assert_close(found, whole, rtol=0, atol=2.0**-16)


# Training by K-sample bounds.


class TrainedVAE(VAE):
    """Linear in both directions, every part a weight."""

    latent_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        sizes = {"a": (4, 2), "b": (2,), "log_std": (2,), "v": (4, 2), "c": (4,)}
        for name, size in sizes.items():
            value = 0.3 * torch.randn(size, dtype=torch.float64, generator=generator)
            self.register_parameter(name, nn.Parameter(value))

    def encode(self, inputs: Tensor) -> Gaussian:
        mean = inputs.flatten(1) @ self.a + self.b
        return gaussian(mean, self.log_std.expand_as(mean))

    def decode(self, z: Tensor) -> Tensor:
        return (self.c + z @ self.v.T)[:, :, None, None]


ENCODER, DECODER = ("a", "b", "log_std"), ("v", "c")


class TwoLayers(VAE):
    """z1 ~ q(z1 | x), z2 ~ q(z2 | z1), p(z1 | z2), p(x | z1); `tied` is a weight of both directions."""

    latent_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        for name, size in {"a": (4, 2), "tied": (2, 2), "log_stds": (3, 2), "v": (4, 2)}.items():
            value = 0.5 * torch.randn(size, dtype=torch.float64, generator=generator)
            self.register_parameter(name, nn.Parameter(value))
        self.shifts = torch.zeros(2, 1, 2, dtype=torch.float64)

    def encode(self, inputs: Tensor) -> Gaussian:
        mean = inputs.flatten(1) @ self.a + self.shifts[0]
        return gaussian(mean, self.log_stds[0].expand_as(mean))

    def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        first = encoding.repeat(samples)
        z1 = first.sample(noise.normal(LATENT, (2,)))
        second = self.second(z1)
        return self.layers(first, z1, second, second.sample(noise.normal(LATENT + 1, (2,))))

    def second(self, z1: Tensor) -> Gaussian:
        mean = torch.tanh(z1 @ self.tied) + self.shifts[1].repeat(len(z1) // self.shifts.shape[1], 1)
        return gaussian(mean, self.log_stds[1].expand_as(z1))

    def layers(self, first: Gaussian, z1: Tensor, second: Gaussian, z2: Tensor) -> Inference:
        prior = gaussian(torch.tanh(z2 @ self.tied.T), self.log_stds[2].expand_as(z1))
        return Inference(
            (Layer(first, prior, z1, analytic=False), Layer(second, standard_normal(z2), z2)), self.decode(z1)
        )

    def decode(self, z: Tensor) -> Tensor:
        return (z @ self.v.T)[:, :, None, None]


IWAE_5 = ObjectiveConfig(bound="iwae", samples=5)
DREG_5 = ObjectiveConfig(bound="iwae", samples=5, gradient="dreg")


def log_weights(vae: VAE, x: Tensor, *, samples: int) -> tuple[Tensor, Inference]:
    """[K, B], written out, with gradients."""
    inference = vae.draw(vae.encode(x), noise(len(x)).folds(range(samples)), samples=samples)
    log_w = GaussianDensity().log_prob(inference.parameters, x.repeat(samples, 1, 1, 1))
    for layer in inference.layers:
        for density, sign in ((layer.prior, 1), (layer.posterior, -1)):
            log_w = log_w + sign * torch.distributions.Normal(density.mean, density.log_std.exp()).log_prob(
                layer.z
            ).sum(1)
    return log_w.view(samples, len(x)), inference


def gradients(vae: VAE, x: Tensor, config: ObjectiveConfig) -> dict[str, Tensor]:
    """Of the sum over images of the negative bound."""
    terms = NegativeELBO(vae, GaussianDensity())(x, noise(len(x)).keys, config)
    total = objective(terms, beta=1.0, free_bits_nats=0.0).sum()
    return dict(zip(dict(vae.named_parameters()), torch.autograd.grad(total, list(vae.parameters())), strict=True))


@pytest.mark.parametrize("family", [TrainedVAE, TwoLayers])
@pytest.mark.parametrize("samples", [1, 2, 5, 50])
def test_trained_bound_is_the_logarithm_of_the_mean_weight(family, samples):
    """Never sum w~ log w, which is larger by log K - H(w~) and may be above log p(x)."""
    vae, x = family(), pictures()
    terms = NegativeELBO(vae, GaussianDensity())(x, noise(5).keys, IWAE_5.model_copy(update={"samples": samples}))
    log_w, inference = log_weights(vae, x, samples=samples)
    torch.testing.assert_close(terms.negative_bound, math.log(samples) - log_w.logsumexp(0), rtol=1e-12, atol=0)
    w = log_w.softmax(0)
    weighed, entropy = (w * log_w).sum(0), -(w * w.log()).sum(0)
    torch.testing.assert_close(weighed + terms.negative_bound, math.log(samples) - entropy)
    assert samples == 1 or (weighed > -terms.negative_bound + 1e-3).all()
    likelihood = GaussianDensity().log_prob(inference.parameters, x.repeat(samples, 1, 1, 1))
    torch.testing.assert_close(terms.distortion, -likelihood.view(samples, -1).mean(0))
    assert terms.layer_rates.shape == (5, len(inference.layers))
    running = RunningTotals(dims_per_image=4, device="cpu")
    running.add(terms)
    assert running.to_host().negative_bound_nats == pytest.approx(terms.negative_bound.sum().item(), abs=1e-4)


def test_one_sample_gives_the_elbo_of_that_sample():
    vae, x = TrainedVAE(), pictures()
    terms = NegativeELBO(vae, GaussianDensity())(x, noise(5).keys, ObjectiveConfig(bound="iwae"))
    log_w, _ = log_weights(vae, x, samples=1)
    torch.testing.assert_close(terms.negative_bound, -log_w[0])
    torch.testing.assert_close(gradients(vae, x, ObjectiveConfig(bound="iwae")), of_surrogate(vae, -log_w.sum()))


def of_surrogate(vae: VAE, total: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(vae.parameters()), allow_unused=True)
    named = zip(vae.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in named}


@pytest.mark.parametrize("family", [TrainedVAE, TwoLayers])
def test_standard_gradient_weighs_each_sample_by_its_normalised_weight(family):
    """The best sample counts most: weights of exp(-loss), held constant."""
    vae, x = family(), pictures()
    log_w, _ = log_weights(vae, x, samples=5)
    expected = of_surrogate(vae, -(log_w.detach().softmax(0) * log_w).sum())
    torch.testing.assert_close(gradients(vae, x, IWAE_5), expected, rtol=1e-9, atol=1e-12)


def test_standard_gradient_is_that_of_finite_differences():
    vae, x, scorer, step = TrainedVAE(), pictures(), None, 1e-6
    scorer, found = NegativeELBO(vae, GaussianDensity()), gradients(vae, x, IWAE_5)
    for name, parameter in vae.named_parameters():
        for i in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * step
                    ends.append(scorer(x, noise(5).keys, IWAE_5).negative_bound.sum().item())
                    parameter.view(-1)[i] -= sign * step
            assert found[name].view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-5)


def test_doubly_reparameterised_gradient_is_the_published_one():
    vae, x = TrainedVAE(), pictures()
    encoding = vae.encode(x)
    z = encoding.repeat(5).sample(noise(5).folds(range(5)).normal(LATENT, (2,)))
    leaf, held = z.detach().requires_grad_(), Gaussian(*(part.detach() for part in encoding.repeat(5)))
    log_w = GaussianDensity().log_prob(vae.decode(leaf), x.repeat(5, 1, 1, 1))
    log_w = (log_w + standard_normal(leaf).log_prob(leaf) - held.log_prob(leaf)).view(5, 5)
    w = log_w.detach().softmax(0)
    (slope,) = torch.autograd.grad(log_w.sum(), leaf, retain_graph=True)
    expected = torch.autograd.grad(z, [vae.a, vae.b, vae.log_std], -slope * w.square().view(-1, 1))
    found = gradients(vae, x, DREG_5)
    for name, gradient in zip(ENCODER, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_doubly_reparameterised_gradient_of_two_layers_is_that_of_codes_held_fixed():
    """sum w~^2 dlog w/dz dz/dphi + sum w~ dlog p/dtheta, from a second pass in which codes are constants."""
    vae, x = TwoLayers(), pictures()
    log_w, inference = log_weights(vae, x, samples=5)
    w = log_w.detach().softmax(0)
    z1, z2 = (layer.z.detach() for layer in inference.layers)
    fixed = vae.layers(vae.encode(x).repeat(5), z1, vae.second(z1), z2)
    log_q = sum(layer.posterior.log_prob(layer.z) for layer in fixed.layers).view(5, 5)
    log_p = GaussianDensity().log_prob(fixed.parameters, x.repeat(5, 1, 1, 1)).view(5, 5)
    log_p = log_p + sum(layer.prior.log_prob(layer.z) for layer in fixed.layers).view(5, 5)
    # All of w~^2 dlog w, less its derivative by weights at fixed codes, plus w~ of the decoder's.
    surrogate = w.square() * log_w - w.square() * (log_p - log_q) + w * log_p
    expected = of_surrogate(vae, -surrogate.sum())
    torch.testing.assert_close(gradients(vae, x, DREG_5), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", [TrainedVAE, TwoLayers])
def test_both_gradients_are_the_same_for_the_decoder(family):
    vae, x = family(), pictures()
    standard, twice = gradients(vae, x, IWAE_5), gradients(vae, x, DREG_5)
    for name in ("v", "c") if family is TrainedVAE else ("v",):
        assert torch.equal(standard[name], twice[name])
    bounds = [NegativeELBO(vae, GaussianDensity())(x, noise(5).keys, config) for config in (IWAE_5, DREG_5)]
    for one, other in zip(*bounds, strict=True):
        assert torch.equal(one, other)


FAMILIES = {
    "mlp": ModelConfig(latent=3, hidden=[9]),
    "two layers": ModelConfig(latent=3, hidden=[9], upper_latent=2, upper_hidden=[5]),
    "tied": ModelConfig(family="tied", latent=3, hidden=[9]),
    "conv": ModelConfig(family="conv", latent=3, channels=[4, 6]),
    "hierarchical": ModelConfig(family="hierarchical", layers="4x2,8x1", width=8, latent_channels=2),
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_family_trains_by_both_gradients(config):
    """One bound, and a gradient for every weight that the ELBO has one for."""
    vae, keys = build_model(config, shape=(1, 8, 8), output_planes=1, seed=1), noise(4).keys
    levels = (noise(4).uniform(0, (1, 8, 8)) < 0.3).to(torch.uint8)
    scorer, found = NegativeELBO(vae, Bernoulli()), {}
    for name, objective_of in (("elbo", ObjectiveConfig()), ("standard", IWAE_5), ("dreg", DREG_5)):
        terms = scorer(levels, keys, objective_of)
        gradients = torch.autograd.grad(objective(terms, beta=1.0, free_bits_nats=0.0).sum(), list(vae.parameters()))
        found[name] = terms.negative_bound, gradients
    assert torch.equal(found["standard"][0], found["dreg"][0])
    bound = importance_bound(vae, Bernoulli(), levels, Noise(keys), samples=5).log_likelihood
    torch.testing.assert_close(-found["dreg"][0], bound, rtol=1e-5, atol=0)
    for elbo, dreg in zip(found["elbo"][1], found["dreg"][1], strict=True):
        assert dreg.isfinite().all()
        assert dreg.any() or not elbo.any()


def per_image(vae: VAE, config: ObjectiveConfig, shift: Tensor, copies: int) -> Tensor:
    """The gradient by each image's own shift of its codes' means."""
    terms = NegativeELBO(vae, GaussianDensity())(pictures(copies), noise(5 * copies).keys, config)
    return torch.autograd.grad(terms.negative_bound.sum(), shift)[0]


@pytest.mark.parametrize("encoder", GAPS)
def test_both_gradients_have_one_mean_and_the_second_varies_less(encoder):
    copies, vae = 4000, LinearVAE(encoder)
    vae.shift = vae.shift.repeat(5 * copies, 1).requires_grad_()
    standard, twice = (per_image(vae, config, vae.shift, copies) for config in (IWAE_5, DREG_5))
    gap = standard - twice
    assert (gap.mean(0).abs() < 4 * gap.std(0) / math.sqrt(len(gap))).all()
    assert (twice.var(0) < 0.75 * standard.var(0)).all()


def test_both_gradients_have_one_mean_in_two_layers():
    copies, vae = 20_000, TwoLayers()
    vae.shifts = torch.zeros(2, 5 * copies, 2, dtype=torch.float64, requires_grad=True)
    standard, twice = (per_image(vae, config, vae.shifts, copies) for config in (IWAE_5, DREG_5))
    gap = standard - twice
    assert (gap.mean(1).abs() < 4 * gap.std(1) / math.sqrt(gap.shape[1])).all()
    assert gap.std() > 0.1


def test_encoder_is_left_alone_at_the_exact_posterior():
    vae = LinearVAE("A")
    vae.shift = vae.shift.repeat(5, 1).requires_grad_()
    assert per_image(vae, DREG_5, vae.shift, 1).abs().max() < 1e-12
    assert per_image(vae, IWAE_5, vae.shift, 1).abs().max() > 0.1


def test_elbo_of_several_codes_is_the_mean_over_them():
    scorer, levels = random_images(6)
    several = scorer(levels, noise(6).keys, ObjectiveConfig(samples=4))
    inference = scorer.vae.draw(scorer.vae.encode(scorer.pixels.to_inputs(levels)), noise(6).folds(range(4)), samples=4)
    expected = -scorer.pixels.log_prob(inference.parameters, levels.repeat(4, 1, 1, 1)).view(4, 6).mean(0)
    torch.testing.assert_close(several.distortion, expected)
    torch.testing.assert_close(several.layer_rates, scorer(levels, noise(6).keys).layer_rates)
    assert several.negative_bound is None


def test_elbo_of_one_code_is_drawn_as_inference_draws_it():
    scorer, levels = random_images(6)
    terms = scorer(levels, noise(6).keys, ObjectiveConfig())
    (layer,), parameters = scorer.vae.infer(scorer.pixels.to_inputs(levels), noise(6))
    assert torch.equal(terms.distortion, -scorer.pixels.log_prob(parameters, levels))
    assert torch.equal(terms.layer_rates, kl(layer.posterior, layer.prior)[:, None])


@pytest.mark.parametrize("config", [IWAE_5, DREG_5, ObjectiveConfig(samples=3)])
def test_no_images_have_no_gradient_with_several_codes(config):
    scorer, levels = random_images(0)
    objective(scorer(levels, noise(0).keys, config), beta=1.0, free_bits_nats=0.0).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())


@pytest.mark.parametrize("config", [IWAE_5, DREG_5])
def test_bounds_need_no_gradients(config):
    with torch.no_grad():
        for vae in (TrainedVAE(), TwoLayers()):
            terms = NegativeELBO(vae, GaussianDensity())(pictures(), noise(5).keys, config)
            assert not terms.negative_bound.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound": "iwae", "kl_warmup_images": 5}, "objective.kl_warmup_images is 5 with bound=iwae.*must be 0"),
        ({"bound": "iwae", "free_bits_nats": 0.5}, "objective.free_bits_nats is 0.5 with bound=iwae.*must be 0"),
        ({"samples": 5, "gradient": "dreg"}, "objective.gradient is dreg with bound=elbo; it must be standard"),
    ],
)
def test_objectives_that_make_no_sense_are_refused_in_one_line(settings, message):
    with pytest.raises(ValidationError) as refusal:
        ObjectiveConfig(**settings)
    (problem,) = refusal.value.errors()
    assert re.search(message, problem["msg"])
    assert "\n" not in problem["msg"]
