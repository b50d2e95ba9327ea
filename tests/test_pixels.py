"""The observation models are probabilities: known values, brute force in float64, and mass one over wild parameters."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from scipy.stats import chi2
from torch.nn import functional as F

from vaejob.config import LikelihoodConfig
from vaejob.errors import ConfigError
from vaejob.likelihood.bernoulli import sum_of_log1p
from vaejob.likelihood.logistic import log_mass
from vaejob.likelihood.pixels import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedGaussian,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    GaussianDensity,
    check_total_mass,
    make_pixels,
    total_mass,
)
from vaejob.likelihood.units import bits_per_dim, density_bits, nats_per_bit_per_dim
from vaejob.model.noise import Noise, image_noise

WILD = st.floats(-1.5, 1.5, width=32) | st.floats(-60, 60, width=32)
MIXTURES = [DiscretizedLogisticMixture(bits=bits, components=3) for bits in range(1, 9)]
MODELS = [
    Bernoulli(),
    *(kind(bits=bits) for bits in range(1, 9) for kind in (DiscretizedLogistic, DiscretizedGaussian)),
    *MIXTURES,
    *(Categorical(bits=bits) for bits in (1, 3, 5)),
]
DENSITIES = [kind(bits=bits) for bits in (1, 5, 8) for kind in (ContinuousBernoulli, GaussianDensity)]


def noise(images: int, **settings) -> Noise:
    return image_noise(np.arange(images), **{"seed": 0, "purpose": "static", "device": "cpu"} | settings)


def one_pixel(*parameters: float) -> torch.Tensor:
    return torch.tensor(parameters, dtype=torch.float32).view(1, -1, 1, 1)


def level(value: int) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.uint8)


def exact_log_mass(j: int, mean: float, log_scale: float, *, levels: int) -> float:
    """The definition, in float64: interior bins by whichever tail keeps the difference of two sigmoids from cancelling."""
    scale, x, half = math.exp(min(max(log_scale, -7.0), 30.0)), -1 + 2 * j / (levels - 1), 1 / (levels - 1)
    low = -math.inf if j == 0 else (x - half - mean) / scale
    high = math.inf if j == levels - 1 else (x + half - mean) / scale
    if low + high > 0:
        low, high = -high, -low
    a, b = np.logaddexp(0, -high), np.logaddexp(0, -low)  # log sigma(t) = -log(1 + e^-t)
    return float(-a + np.log1p(-np.exp(a - b)))


# From an independent float64 implementation of the 256-level likelihood.
@pytest.mark.parametrize(
    ("value", "mean", "log_scale", "expected"),
    [
        (127, 0, -2, -4.234690553762955),
        (0, 0, -2, -7.360715354032355),
        (100, 0.3, -4, -28.99600404868466),
        (255, -1, -7, -2188.965794667002),
        (200, 1, -7, -468.7571026323213),
    ],
)
def test_logistic_has_its_known_values(value, mean, log_scale, expected):
    wide = log_mass(*torch.tensor([mean, log_scale], dtype=torch.float64), torch.tensor(value), count=256)
    assert wide.item() == pytest.approx(expected, rel=1e-9)
    found = DiscretizedLogistic().log_prob(one_pixel(mean, log_scale), level(value)).item()
    assert found == pytest.approx(expected, rel=3e-5)
    assert exact_log_mass(value, mean, log_scale, levels=256) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.data(), st.floats(-3, 3, width=32), st.floats(-12, 5, width=32))
def test_logistic_equals_brute_force(bits, data, mean, log_scale):
    pixels = DiscretizedLogistic(bits=bits)
    j = data.draw(st.integers(0, pixels.levels - 1))
    found = pixels.log_prob(one_pixel(mean, log_scale), level(j)).item()
    # Float32 knows the distance of a level from the mean to 2^-23, which narrow scales magnify.
    slack = 3e-7 * math.exp(-max(log_scale, -7.0))
    assert found == pytest.approx(exact_log_mass(j, mean, log_scale, levels=pixels.levels), rel=3e-5, abs=1e-5 + slack)


@pytest.mark.parametrize("pixels", MODELS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pixel_probabilities_sum_to_one(pixels, data):
    count = pixels.parameters(1)
    row = st.lists(WILD, min_size=count, max_size=count)
    parameters = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=max(1, 100 // count))))  # drawing is slow
    mass = total_mass(pixels, parameters.view(len(parameters), -1, 1, 1))
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pixels", [*MODELS, *DENSITIES], ids=repr)
def test_start_up_check_passes_for_each_model(pixels):
    check_total_mass(pixels)


def test_start_up_check_refuses_what_is_not_a_likelihood():
    class OverlappingBins(DiscretizedLogistic):
        def log_prob(self, parameters, levels):
            return super().log_prob(parameters, levels) + 1e-4

    with pytest.raises(ConfigError, match="sum to 1"):
        check_total_mass(OverlappingBins())


def test_mass_covers_each_channel_by_itself():
    parameters = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    assert total_mass(DiscretizedLogistic(bits=3), parameters).shape == (2 * 3 * 3 * 4,)


def test_log_prob_adds_up_channels_and_pixels():
    pixels, generator = DiscretizedLogistic(bits=4), torch.Generator().manual_seed(1)
    parameters = torch.randn(2, 2, 3, 2, 2, generator=generator)  # mean or scale, then channel, then pixel
    levels = torch.randint(0, 16, (2, 3, 2, 2), generator=generator, dtype=torch.uint8)
    found = pixels.log_prob(parameters.flatten(1, 2), levels)
    for image in range(2):
        each = [
            exact_log_mass(int(levels[image][at]), *parameters[image][(slice(None), *at)].tolist(), levels=16)
            for at in np.ndindex(3, 2, 2)
        ]
        assert found[image].item() == pytest.approx(sum(each), rel=1e-5)


def test_bernoulli_equals_cross_entropy():
    logits = torch.linspace(-80, 80, 4 * 784).view(4, 1, 28, 28)
    levels = Bernoulli(binarize="dynamic").to_levels(torch.full((4, 1, 28, 28), 99, dtype=torch.uint8), noise(4))
    exact = F.binary_cross_entropy_with_logits(logits.double(), levels.double(), reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(logits, levels), -exact.float())


@pytest.mark.parametrize("pixels", [*MODELS, *DENSITIES], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_nats_are_float32(pixels, dtype):
    edges = torch.tensor([-1e4, -80.0, -7.0, -1.0, 0.0, 1.0, 7.0, 80.0, 1e4])
    grid = torch.cartesian_prod(edges, edges).repeat(1, pixels.parameters(1))[:, : pixels.parameters(1), None, None]
    for j in {0, 1, pixels.levels // 2, pixels.levels - 1}:
        parameters = grid.to(dtype).requires_grad_()
        nats = pixels.log_prob(parameters, torch.full((len(grid), 1, 1, 1), j, dtype=torch.uint8))
        assert nats.dtype == torch.float32
        assert nats.isfinite().all()
        (gradient,) = torch.autograd.grad(nats.sum(), parameters)
        assert gradient.isfinite().all()


def test_gradient_equals_finite_differences():
    pixels, j = DiscretizedLogistic(bits=5), 20
    for mean, log_scale in [(0.1, -1.0), (-0.4, -3.0), (1.2, 0.5)]:
        parameters = one_pixel(mean, log_scale).requires_grad_()
        (gradient,) = torch.autograd.grad(pixels.log_prob(parameters, level(j)).sum(), parameters)
        for i, (up, down) in enumerate([((1e-5, 0), (-1e-5, 0)), ((0, 1e-5), (0, -1e-5))]):
            values = [exact_log_mass(j, mean + m, log_scale + s, levels=32) for m, s in (up, down)]
            assert gradient[0, i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lower_bits_drop_the_lowest_digits(bits):
    pixels = DiscretizedLogistic(bits=bits)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    levels = pixels.to_levels(images, noise(1))
    assert levels.flatten().tolist() == [value >> (8 - bits) for value in range(256)]
    assert pixels.to_inputs(levels).aminmax() == (-1, 1)
    assert pixels.to_uint8(levels).unique().tolist() == [round(255 * j / (2**bits - 1)) for j in range(2**bits)]


def test_threshold_is_at_half():
    levels = Bernoulli().to_levels(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), noise(1))
    assert levels.flatten().tolist() == [0] * 128 + [1] * 128


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_grey_is_the_probability_of_white(binarize):
    grey = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    levels = Bernoulli(binarize=binarize).to_levels(grey.expand(20_000, 1, 1, 6), noise(20_000))
    found, expected = levels.double().mean(0).flatten(), grey / 255
    assert found[0] == 0
    assert found[-1] == 1
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-12).all()


def test_dynamic_binarisation_changes_with_the_epoch_and_static_does_not():
    images, pixels = torch.full((2, 1, 28, 28), 128, dtype=torch.uint8), Bernoulli(binarize="dynamic")
    drawn = [pixels.to_levels(images, noise(2, purpose="train", epoch=epoch)) for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("mean", "log_scale"), [(0.2, -2.0), (-1.1, -1.0), (0.9, -6.0), (0.0, 1.0)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_samples_and_mean_follow_the_probabilities(bits, mean, log_scale):
    pixels, images = DiscretizedLogistic(bits=bits), 40_000
    levels = torch.arange(pixels.levels)
    mass = torch.tensor([exact_log_mass(j, mean, log_scale, levels=pixels.levels) for j in levels.tolist()]).exp()
    parameters = one_pixel(mean, log_scale).expand(images, -1, -1, -1)
    drawn = pixels.sample(parameters, noise(images)).flatten().long()
    found = torch.bincount(drawn, minlength=pixels.levels) / images
    assert ((found - mass).abs() <= 5 * (mass / images).sqrt() + 5 / images).all()
    expected = (mass * levels).sum() / (pixels.levels - 1)
    torch.testing.assert_close(pixels.mean(parameters[:1]).flatten(), expected.float().view(1), rtol=0, atol=2e-5)


def test_bernoulli_samples_follow_the_mean():
    parameters = one_pixel(-1.0).expand(20_000, -1, -1, -1)
    expected = torch.tensor(-1.0).sigmoid()
    assert abs(Bernoulli().sample(parameters, noise(20_000)).double().mean() - expected) < 4 * 0.5 / 20_000**0.5
    assert Bernoulli().mean(parameters[:1]).item() == pytest.approx(expected.item())


def test_training_starts_at_the_mean_of_the_pixels():
    mean_levels = torch.tensor([[[0.0, 0.25, 1.0]]])
    start = Bernoulli().initial_parameters(mean_levels)
    torch.testing.assert_close(start.sigmoid(), mean_levels.clamp(0.001, 0.999))


START = [
    *(kind(bits=bits) for bits in (1, 5, 8) for kind in (DiscretizedLogistic, DiscretizedGaussian, Categorical)),
    *(DiscretizedLogisticMixture(bits=bits, components=m) for bits in (1, 8) for m in (1, 4)),
    *DENSITIES,
]


@pytest.mark.parametrize("pixels", START, ids=repr)
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pixels_start_at_their_mean_and_a_hundredth_off_black_and_white(pixels, channels):
    grey = torch.tensor([0.0, 0.003, 0.01, 0.2, 0.5, 0.77, 0.99, 1.0]).repeat(channels).view(channels, 2, 4)
    start = pixels.initial_parameters(grey * (pixels.levels - 1))
    assert start.shape == (pixels.parameters(channels), 2, 4)
    found = pixels.mean(start.unsqueeze(0))[0]
    exact = isinstance(pixels, GaussianDensity)  # its parameter is the mean
    torch.testing.assert_close(found, grey if exact else grey.clamp(0.01, 0.99), rtol=0, atol=2e-5)
    black = torch.zeros(1, channels, 2, 4, dtype=torch.uint8)
    assert pixels.log_prob(start.unsqueeze(0), black).isfinite()


def rgb_levels(bits: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(1 << bits, dtype=torch.uint8)] * 3)[:, :, None, None]


def coupled(seed: int, *, bits: int, log_scale: float, spread: float) -> torch.Tensor:
    """Parameters of one RGB pixel: three components, all coupled, the scales about e^log_scale."""
    planes = torch.randn(3 * 10, generator=torch.Generator().manual_seed(seed))
    planes[3:12] = planes[3:12].clamp(-1, 1) * spread
    planes[12:21] = planes[12:21] * 0.3 + log_scale
    return planes.view(1, -1, 1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_samples_of_a_coupled_mixture_follow_its_joint_probabilities(seed):
    """Pearson's chi^2 over all 64 colours of 2 bits: a wrong component, coupling or order of channels would show."""
    pixels, images = DiscretizedLogisticMixture(bits=2, components=3), 40_000
    parameters = coupled(seed, bits=2, log_scale=-1.0, spread=0.8)
    mass = pixels.log_prob(parameters.expand(64, -1, -1, -1), rgb_levels(2)).double().exp()
    drawn = pixels.sample(parameters.expand(images, -1, -1, -1), noise(images)).long()
    assert chi_squared_p(drawn[:, 0] * 16 + drawn[:, 1] * 4 + drawn[:, 2], mass) > 1e-3
    swapped = mass.view(4, 4, 4).transpose(1, 2).flatten()
    assert chi_squared_p(drawn[:, 0] * 16 + drawn[:, 1] * 4 + drawn[:, 2], swapped) < 1e-9


def chi_squared_p(drawn: torch.Tensor, mass: torch.Tensor) -> float:
    """Levels that are expected less than five times are taken together."""
    counts, expected = torch.bincount(drawn.flatten(), minlength=len(mass)).double(), mass * drawn.numel()
    rare = expected < 5
    counts, expected = (torch.cat((each[~rare], each[rare].sum()[None])) for each in (counts, expected))
    kept = expected > 1e-3
    assert counts[~kept].sum() == 0
    return float(chi2.sf(((counts - expected).square() / expected)[kept].sum().item(), int(kept.sum()) - 1))


@pytest.mark.parametrize("pixels", [kind(bits=3) for kind in (ContinuousBernoulli, GaussianDensity)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_samples_of_a_density_follow_its_integral_over_each_bin(pixels, seed):
    """What is drawn is rounded to a level; that of either end takes what lies beyond."""
    images, generator = 40_000, torch.Generator().manual_seed(seed)
    parameters = torch.randn(1, pixels.parameters(1), 1, 1, generator=generator) - 0.5
    low, high = (float(end) for end in pixels.support(parameters))
    edges = [low, *((j - 0.5) / 7 for j in range(1, 8)), high]
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
    mass = []
    for start, stop in itertools.pairwise(edges):
        start, stop = (min(max(edge, low), high) for edge in (start, stop))
        x = (start + (stop - start) * (nodes + 1) / 2).float().view(-1, 1, 1, 1)
        density = pixels.log_density(parameters.expand(64, -1, -1, -1), x).double().exp()
        mass.append((density * weights).sum() * (stop - start) / 2)
    mass = torch.stack(mass)
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = pixels.sample(parameters.expand(images, -1, -1, -1), noise(images)).long()
    assert chi_squared_p(drawn, mass) > 1e-3
    assert chi_squared_p(drawn, mass.flip(0)) < 1e-9


@pytest.mark.parametrize(("log_scale", "spread", "bound"), [(-3.0, 0.8, 0.02), (-2.0, 0.8, 0.03), (0.0, 1.0, 0.2)])
def test_mean_of_a_coupled_mixture_is_near_the_sum_over_all_colours(log_scale, spread, bound):
    """Red's is exact; the others take the channels before at their mean, which errs where mass is cut off at either end."""
    pixels, every = DiscretizedLogisticMixture(bits=3, components=3), rgb_levels(3)
    for seed in range(20):
        parameters = coupled(seed, bits=3, log_scale=log_scale, spread=spread)
        mass = pixels.log_prob(parameters.expand(512, -1, -1, -1), every).double().exp()
        exact = (mass[:, None] * every.flatten(1) / 7).sum(0)
        found = pixels.mean(parameters).double().flatten()
        assert abs(found[0] - exact[0]) < 1e-5
        assert (found - exact).abs().max() < bound
        uncoupled = parameters.clone()
        uncoupled[:, 21:] = 0
        mass = pixels.log_prob(uncoupled.expand(512, -1, -1, -1), every).double().exp()
        exact = (mass[:, None] * every.flatten(1) / 7).sum(0)
        torch.testing.assert_close(pixels.mean(uncoupled).double().flatten(), exact, rtol=0, atol=1e-5)


def test_a_density_of_constant_pictures_exceeds_one():
    """784 pixels at their mean with a scale of half a grey level: 4,173 nats above zero, and 0.33 bits/dim once corrected."""
    pixels = GaussianDensity()
    parameters = torch.cat((torch.full((1, 1, 28, 28), 100 / 255), torch.full((1, 1, 28, 28), -50.0)), 1)
    nats = pixels.log_prob(parameters, torch.full((1, 1, 28, 28), 100, dtype=torch.uint8)).item()
    assert nats == pytest.approx(784 * (math.log(2 * 255) - 0.5 * math.log(2 * math.pi)), rel=1e-6)
    assert nats > 4000
    corrected = bits_per_dim(-nats, 784) + pixels.density_bits_correction
    assert corrected == pytest.approx(0.5 * math.log2(2 * math.pi) - 1, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("name", get_args(LikelihoodConfig.model_fields["pixels"].annotation))
def test_what_a_density_lacks_is_known_without_its_model(name, bits):
    likelihood = LikelihoodConfig(pixels=name, bits=bits, binarize="threshold" if name == "bernoulli" else "none")
    pixels = make_pixels(likelihood)
    assert density_bits(likelihood) == (pixels.density_bits_correction if pixels.is_density else None)


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"pixels": "bernoulli", "binarize": "static"}, 2),
        ({"pixels": "bernoulli", "bits": 1}, 2),
        ({"pixels": "discretized-logistic", "bits": 5}, 32),
        ({"pixels": "discretized-logistic"}, 256),
        ({"pixels": "discretized-logistic-mixture", "components": 4}, 256),
        ({"pixels": "discretized-gaussian", "bits": 3}, 8),
        ({"pixels": "categorical", "bits": 2}, 4),
        ({"pixels": "gaussian"}, 256),
        ({"pixels": "continuous-bernoulli"}, 256),
    ],
)
def test_configuration_chooses_the_model(settings, levels):
    assert make_pixels(LikelihoodConfig(**settings)).levels == levels


def test_uniform_mass_is_as_many_bits_as_the_pixels_have():
    assert bits_per_dim(3072 * math.log(256), 3072) == pytest.approx(8)
    assert nats_per_bit_per_dim(784) == pytest.approx(543.43, abs=0.005)
    assert nats_per_bit_per_dim(3072) == pytest.approx(2129.35, abs=0.005)


def test_mixture_sums_to_one_jointly_over_rgb():
    pixels = DiscretizedLogisticMixture(bits=2, components=3)
    parameters = torch.randn(6, pixels.parameters(3), 1, 1, generator=torch.Generator().manual_seed(2)) * 2
    rgb = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 3)[:, :, None, None]
    for one in parameters.split(1):
        mass = pixels.log_prob(one.expand(64, -1, -1, -1), rgb).double().exp().sum()
        assert mass.item() == pytest.approx(1, abs=1e-5)


def test_mixture_equals_its_definition_in_rgb():
    pixels = DiscretizedLogisticMixture(bits=5, components=2)
    p = torch.randn(1, 20, 1, 1, generator=torch.Generator().manual_seed(3))
    levels = torch.tensor([3, 20, 31], dtype=torch.uint8)
    w, (mean, log_scale, k) = p[0, :2, 0, 0].double().log_softmax(0), p[0, 2:, 0, 0].double().view(3, 2, 3)
    x, k, each = levels.double() * 2 / 31 - 1, k.tanh(), []
    for m in range(2):
        means = (
            mean[m, 0],
            mean[m, 1] + k[m, 0] * x[0],
            mean[m, 2] + k[m, 1] * x[0] + k[m, 2] * x[1],
        )
        nats = [exact_log_mass(int(levels[c]), float(means[c]), float(log_scale[m, c]), levels=32) for c in range(3)]
        each.append(w[m] + sum(nats))
    expected = torch.stack(each).logsumexp(0).item()
    assert pixels.log_prob(p, levels.view(1, 3, 1, 1)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_of_one_is_the_logistic(channels):
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(5, 2 * channels, 2, 2, generator=generator)
    levels = torch.randint(0, 256, (5, channels, 2, 2), generator=generator, dtype=torch.uint8)
    mixture = DiscretizedLogisticMixture(components=1)
    padded = torch.cat((torch.randn(5, 1, 2, 2), p, torch.zeros(5, 3 if channels == 3 else 0, 2, 2)), 1)
    single = DiscretizedLogistic()
    torch.testing.assert_close(mixture.log_prob(padded, levels), single.log_prob(p, levels), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixture.mean(padded), single.mean(p))
    assert torch.equal(mixture.sample(padded, noise(5)), single.sample(p, noise(5)))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.data(), st.floats(-3, 3, width=32), st.floats(-7, 5, width=32))
def test_discretized_gaussian_equals_float64(bits, data, mean, log_scale):
    pixels = DiscretizedGaussian(bits=bits)
    j, top = data.draw(st.integers(0, pixels.levels - 1)), pixels.levels - 1
    scale, x = math.exp(log_scale), 2 * j / top - 1
    low, high = (x - 1 / top - mean) / scale, (x + 1 / top - mean) / scale
    if abs(low + high) < 8 and high - low < 0.05:  # a Taylor series where even float64 cancels
        m, w = (low + high) / 2, high - low
        inside = -m * m / 2 - 0.5 * math.log(2 * math.pi) + math.log(w) + math.log1p((m * m - 1) * w * w / 24)
    else:
        a, b = sorted((abs(low), abs(high))) if low * high > 0 else (low, high)
        a, b = (-b, -a) if low * high > 0 else (a, b)
        inside = float(log_ndtr(b) + np.log1p(-np.exp(log_ndtr(a) - log_ndtr(b))))
    exact = log_ndtr(high) if j == 0 else log_ndtr(-low) if j == top else inside
    found = pixels.log_prob(one_pixel(mean, log_scale), level(j)).item()
    # Nats change by |z| dz, and float32 knows z to 2^-22 / scale.
    slack = 1e-6 / scale * max(abs(low), abs(high), 1)
    assert found == pytest.approx(float(exact), rel=1e-5, abs=2e-5 + slack)


@pytest.mark.parametrize("pixels", DENSITIES, ids=repr)
def test_densities_integrate_to_one(pixels):
    parameters = torch.randn(50, pixels.parameters(1), 1, 1, generator=torch.Generator().manual_seed(5)) * 3
    mass = total_mass(pixels, parameters)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@pytest.mark.parametrize("logit", [-60, -3, -0.61, -0.59, -1e-3, 0, 1e-6, 0.5, 0.7, 20, 80])
@pytest.mark.parametrize("j", [0, 77, 255])
def test_continuous_bernoulli_equals_its_closed_form(logit, j):
    exact = logit * j / 255 + (math.log(logit / math.expm1(logit)) if logit else 0)
    assert ContinuousBernoulli().log_prob(one_pixel(logit), level(j)).item() == pytest.approx(exact, rel=1e-5, abs=1e-6)
    mean = 0.5 + logit / 12 if abs(logit) < 1e-2 else 1 / -math.expm1(-logit) - 1 / logit
    assert ContinuousBernoulli().mean(one_pixel(logit)).item() == pytest.approx(mean, abs=1e-6)


def test_gaussian_density_stops_at_half_a_grey_level():
    nats = GaussianDensity().log_prob(one_pixel(100 / 255, -50.0), level(100)).item()
    assert nats == pytest.approx(-math.log(0.5 / 255) - 0.5 * math.log(2 * math.pi), rel=1e-6)
    assert GaussianDensity().density_bits_correction == math.log2(255)


@pytest.mark.parametrize("pixels", [*MODELS, *DENSITIES], ids=repr)
def test_bfloat16_parameters_are_widened_first(pixels):
    narrow = torch.randn(4, pixels.parameters(1), 2, 2, generator=torch.Generator().manual_seed(6)).bfloat16()
    levels = torch.randint(0, pixels.levels, (4, 1, 2, 2), dtype=torch.uint8)
    assert torch.equal(pixels.log_prob(narrow, levels), pixels.log_prob(narrow.float(), levels))


@pytest.mark.parametrize(
    "pixels",
    [Categorical(bits=3), DiscretizedGaussian(bits=4), DiscretizedLogisticMixture(bits=4, components=3)],
    ids=repr,
)
def test_samples_and_mean_follow_log_prob(pixels):
    images = 40_000
    one = torch.randn(1, pixels.parameters(1), 1, 1, generator=torch.Generator().manual_seed(7))
    every = torch.arange(pixels.levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    mass = pixels.log_prob(one.expand(len(every), -1, -1, -1), every).exp()
    drawn = pixels.sample(one.expand(images, -1, -1, -1), noise(images)).flatten().long()
    found = torch.bincount(drawn, minlength=pixels.levels) / images
    assert ((found - mass).abs() <= 5 * (mass / images).sqrt() + 5 / images).all()
    expected = (mass * torch.arange(pixels.levels)).sum() / (pixels.levels - 1)
    assert pixels.mean(one).item() == pytest.approx(expected.item(), abs=2e-5)


def test_narrow_logistics_do_not_fall_back_to_a_density():
    """At level 125 the truth is -17.20; PixelCNN++'s density times bin width gives -19.35."""
    exact = [exact_log_mass(j, 0.0, -7.0, levels=256) for j in (125, 126, 127, 128, 129)]
    found = [DiscretizedLogistic().log_prob(one_pixel(0.0, -7.0), level(j)).item() for j in (125, 126, 127, 128, 129)]
    assert found == pytest.approx(exact, rel=1e-4)


LOGISTICS = [DiscretizedLogistic(), DiscretizedLogistic(bits=1), *MIXTURES]


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("pixels", LOGISTICS, ids=repr)
def test_gradients_of_logistics_equal_finite_differences(pixels, channels):
    generator = torch.Generator().manual_seed(8)
    parameters = torch.randn(3, pixels.parameters(channels), 2, 2, generator=generator, dtype=torch.float64)
    levels = torch.randint(0, pixels.levels, (3, channels, 2, 2), generator=generator, dtype=torch.uint8)
    levels[0, :, 0], levels[1, :, 0] = 0, pixels.levels - 1
    assert torch.autograd.gradcheck(lambda p: pixels.log_prob(p, levels), parameters.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [DiscretizedLogistic(), DiscretizedLogisticMixture()], ids=repr)
def test_logistics_keep_their_gradient_alone_for_backward(pixels, dtype):
    """And a pixel's nats are the same number whether a gradient is wanted or not, of an image in any company."""
    generator = torch.Generator().manual_seed(9)
    parameters = torch.randn(5, pixels.parameters(3), 64, 48, generator=generator).to(dtype).requires_grad_()
    levels = torch.randint(0, 256, (5, 3, 64, 48), generator=generator, dtype=torch.uint8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.nbytes) or one, lambda one: one):
        nats = pixels.log_prob(parameters, levels)
    assert sum(kept) <= 1.2 * parameters.nbytes
    with torch.no_grad():
        assert torch.equal(pixels.log_prob(parameters, levels), nats)
        assert torch.equal(pixels.log_prob(parameters[2:3], levels[2:3]), nats[2:3])
        last = parameters.contiguous(memory_format=torch.channels_last)
        assert torch.equal(pixels.log_prob(last, levels), nats)


def test_pieces_of_any_size_are_the_whole(monkeypatch):
    pixels, generator = DiscretizedLogisticMixture(components=2), torch.Generator().manual_seed(10)
    parameters = torch.randn(7, 20, 5, 5, generator=generator, requires_grad=True)
    levels = torch.randint(0, 256, (7, 3, 5, 5), generator=generator, dtype=torch.uint8)
    upstream = torch.arange(7.0)
    whole = pixels.log_prob(parameters, levels)
    (expected,) = torch.autograd.grad(whole, parameters, upstream)
    for size in (1, 200, 1200):  # a pixel, some pixels, some images
        monkeypatch.setattr("vaejob.likelihood.logistic_mass.PIECE_VALUES", size)
        nats = pixels.log_prob(parameters, levels)
        torch.testing.assert_close(nats, whole, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(nats, parameters, upstream)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_bfloat16_gradients_are_not_rounded():
    """1 / 100 in bfloat16 is 0.1 % too large: nothing next to noise, but the same for every pixel."""
    pixels, generator = DiscretizedLogistic(), torch.Generator().manual_seed(11)
    parameters = torch.randn(2, 2, 16, 16, generator=generator).bfloat16()
    levels = torch.randint(0, 256, (2, 1, 16, 16), generator=generator, dtype=torch.uint8)
    narrow, wide = parameters.clone().requires_grad_(), parameters.double().requires_grad_()
    for each in (narrow, wide):
        (pixels.log_prob(each, levels).sum() / 100).backward()
    ratio = (narrow.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert abs(ratio.item() - 1) < 5e-4


@pytest.mark.parametrize("pixels", [1, 15, 16, 100, 784])
def test_logarithms_of_products_are_sums_of_logarithms(pixels):
    chance = torch.Generator().manual_seed(11)
    u = torch.rand(50, pixels, generator=chance) ** torch.randint(1, 40, (50, pixels), generator=chance)
    u[0], u[1] = 0.0, 1.0
    found, right = sum_of_log1p(u).double(), u.double().log1p().sum(1)
    assert (found - right).abs().max() <= pixels * 2.0**-24 + 4e-7 * right.max()
