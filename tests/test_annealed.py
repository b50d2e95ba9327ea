"""Annealing bounds log p(x) from both sides: exactly so in a linear-Gaussian model, and where x was drawn from the model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.test_bounds import (
    LOG_P,
    MU,
    POSTERIOR_VARIANCE,
    S2,
    GaussianDensity,
    LinearVAE,
    TwoLayers,
    W,
    noise,
    pictures,
    random_images,
)
from vaejob.errors import ConfigError
from vaejob.likelihood.annealed import START, annealed_bound
from vaejob.likelihood.bounds import importance_bound
from vaejob.model.gaussian import Gaussian
from vaejob.model.noise import LATENT, Noise, image_noise
from vaejob.model.vae import Inference


def posterior_samples(x: Tensor) -> Tensor:
    """Exact ones of the linear model."""
    mean = (x.flatten(1) - MU) @ (W * POSTERIOR_VARIANCE / S2)
    eps = image_noise(np.arange(len(x)), seed=5, purpose="sample", device="cpu").normal(LATENT, (2,))
    return mean + POSTERIOR_VARIANCE.sqrt() * eps


def test_chains_from_both_ends_enclose_log_p_within_a_twentieth_of_a_nat():
    copies = 8
    vae, pixels, x, keys = LinearVAE(), GaussianDensity(), pictures(copies), noise(5 * copies)
    settings = {"temperatures": 200, "chains": 16}
    below = annealed_bound(vae, pixels, x, keys, **settings)
    above = annealed_bound(vae, pixels, x, keys, **settings, reverse_from=posterior_samples(x))
    for bound, sign in ((below, 1), (above, -1)):
        gap = sign * (LOG_P.repeat(copies) - bound.log_likelihood)
        error = gap.std() / math.sqrt(len(gap))
        assert -4 * error < gap.mean() < 0.05
        assert (bound.effective_samples > 4).all()
        assert 0.5 < bound.accepted.mean() < 0.95


@pytest.mark.parametrize("temperatures", [1, 10, 25])
def test_weights_have_the_mean_p_of_x_with_any_number_of_temperatures(temperatures):
    """And those of chains that go back 1 / p(x): the moves leave each distribution as it is."""
    copies = 1000
    vae, pixels, keys = LinearVAE(), GaussianDensity(), noise(copies)
    x = pictures()[1:2].repeat(copies, 1, 1, 1)
    settings = {"temperatures": temperatures, "chains": 1, "leapfrog_steps": 3, "step_size": 0.3}
    # Without moves 1 / p(x | z) has no variance to go by.
    for start, sign in ((None, 1), (posterior_samples(x), -1))[: 1 if temperatures == 1 else 2]:
        bound = annealed_bound(vae, pixels, x, keys, **settings, reverse_from=start)
        ratio = (sign * (bound.log_likelihood - LOG_P[1])).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(copies)


def test_one_temperature_is_importance_sampling_from_the_prior():
    vae, pixels, x = LinearVAE(), GaussianDensity(), pictures()
    found = annealed_bound(vae, pixels, x, noise(5), temperatures=1, chains=30).log_likelihood
    z = noise(5).fold(1).folds(range(30)).normal(START, (2,)).double()
    log_w = pixels.log_prob(vae.decode(z), x.repeat(30, 1, 1, 1)).view(30, 5)
    torch.testing.assert_close(found, log_w.logsumexp(0) - math.log(30))


def test_more_temperatures_raise_the_lower_bound():
    x, keys = pictures(20), noise(100)
    means = [
        annealed_bound(LinearVAE(), GaussianDensity(), x, keys, temperatures=t, chains=2).log_likelihood.mean().item()
        for t in (1, 5, 30)
    ]
    assert means == sorted(means)


def test_bounds_of_images_drawn_from_a_network_enclose_its_log_p():
    scorer, _ = random_images(30)
    vae, pixels, drawn = scorer.vae, scorer.pixels, noise(30, purpose="sample")
    z = drawn.normal(LATENT, vae.latent_shape)
    levels = pixels.sample(vae.decode(z), drawn)
    settings = {"temperatures": 100, "chains": 8, "leapfrog_steps": 5}
    below = annealed_bound(vae, pixels, levels, noise(30), **settings).log_likelihood
    above = annealed_bound(vae, pixels, levels, noise(30), **settings, reverse_from=z).log_likelihood
    gap = above - below
    assert -4 * gap.std() / math.sqrt(30) < gap.mean() < 0.05
    iwae = importance_bound(vae, pixels, levels, noise(30), samples=200).log_likelihood
    slack = above - iwae
    assert slack.mean() > -4 * slack.std() / math.sqrt(30)


def test_an_image_has_the_same_bound_in_any_company():
    vae, pixels, x, keys, some = LinearVAE(), GaussianDensity(), pictures(), noise(5).keys, torch.tensor([3, 1])
    settings = {"temperatures": 20, "chains": 3}
    whole = annealed_bound(vae, pixels, x, Noise(keys), **settings)
    again = annealed_bound(vae, pixels, x, Noise(keys), **settings)
    part = annealed_bound(vae, pixels, x[some], Noise(keys[some]), **settings)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    torch.testing.assert_close(part.log_likelihood, whole.log_likelihood[some], rtol=0, atol=1e-9)


def test_a_step_that_diverges_is_refused_and_the_bound_stays_finite():
    x = pictures()
    bound = annealed_bound(LinearVAE(), GaussianDensity(), x, noise(5), temperatures=10, chains=4, step_size=1e200)
    assert bound.log_likelihood.isfinite().all()
    assert not bound.accepted.any()


def test_no_images_have_no_bound():
    scorer, levels = random_images(0)
    bound = annealed_bound(scorer.vae, scorer.pixels, levels, noise(0), temperatures=3, chains=2)
    assert bound.log_likelihood.shape == (0,)


def test_weights_are_left_as_they_are():
    scorer, levels = random_images(2)
    annealed_bound(scorer.vae, scorer.pixels, levels, noise(2), temperatures=3, chains=2)
    assert all(p.grad is None and p.requires_grad for p in scorer.parameters())


def test_models_that_annealing_does_not_know_are_refused_in_one_line():
    class LearntPrior(LinearVAE):
        def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
            (layer,), parameters = super().draw(encoding, noise, samples=samples)
            prior = Gaussian(layer.prior.mean + 1, layer.prior.log_std)
            return Inference((layer._replace(prior=prior),), parameters)

    for vae, message in ((TwoLayers(), "2 stochastic layers"), (LearntPrior(), "prior is learnt")):
        with pytest.raises(ConfigError, match=message):
            annealed_bound(vae, GaussianDensity(), pictures(), noise(5), temperatures=3, chains=1)
