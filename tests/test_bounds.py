"""Bounds against a linear-Gaussian model whose log p(x), ELBO and K-sample bounds are known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vaejob.config import ModelConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, importance_bound, objective
from vaejob.likelihood.pixels import Bernoulli
from vaejob.model import VAE, build_model
from vaejob.model.gaussian import Gaussian, gaussian, kl
from vaejob.model.noise import LATENT, Noise, image_noise

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
    "B": {1: -0.373426410, 2: -0.126521692, 5: -0.038617457, 50: -0.003411760},
    "C": {1: -0.073841036, 2: -0.046738520, 5: -0.023374708, 50: -0.003018014},
    "D": {1: -0.158145366, 2: -0.117367454, 5: -0.074681750, 50: -0.019406519},
}


class LinearVAE(VAE):
    """The linear-Gaussian model, in the precision it is given."""

    latent_shape = (2,)

    def __init__(self, encoder: str = "A", *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        shift, rho = ENCODERS[encoder]
        self.dtype = dtype
        self.shift = torch.tensor([shift, 0], dtype=dtype)
        self.log_std = (POSTERIOR_VARIANCE * torch.tensor([rho, 1])).log().to(dtype) / 2

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


@pytest.mark.parametrize("samples", [1, 2, 5, 50])
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
    vae = build_model(ModelConfig(latent=6, hidden=[20]), shape=(1, 8, 8), parameters_per_channel=1, seed=1)
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
