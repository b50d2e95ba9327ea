"""Likelihoods known in closed form, by a path without chance where there is one: float64 to 1e-6 or better.

Where data is needed that is not small, VAEJOB_TEST_DATA names a folder with mnist/ (the four idx files of LeCun et al., as
.gz) and cifar10/jpeg-{train,test}.parquet; without it these tests are skipped.
"""

import gzip
import hashlib
import io
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_bounds import (
    ENCODERS,
    LOG_P,
    MU,
    POSTERIOR_VARIANCE,
    S2,
    GaussianDensity,
    LinearVAE,
    W,
    log_p,
    noise,
    pictures,
)
from vaejob.config import LikelihoodConfig, ModelConfig
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.likelihood.pixels import Bernoulli, Categorical
from vaejob.likelihood.units import bits_per_dim
from vaejob.model import VAE, build_model
from vaejob.model.gaussian import Gaussian, gaussian, kl, standard_normal
from vaejob.model.noise import LATENT, Noise
from vaejob.model.vae import Inference, Layer
from vaejob.training.evaluate import evaluate

SAMPLES = (1, 2, 5, 10, 50, 100, 500, 1000, 5000)
TABLE = {
    "A": (0.0,) * 9,
    "B": (-0.373426410, -0.126521692, -0.038617457, -0.017953646, -0.003411760,
          -0.001695615, -0.000337507, -0.000168653, -0.000033715),
    "C": (-0.073841036, -0.046738520, -0.023374708, -0.013102515, -0.003018014,
          -0.001550733, -0.000318782, -0.000160068, -0.000032133),
    "D": (-0.158145366, -0.117367454, -0.074681750, -0.051139237, -0.019406519,
          -0.012434325, -0.004246959, -0.002642191, -0.000863905),
}  # fmt: skip
"""E[K-sample bound] - log p(x) of the linear model, for every x, by encoder and K."""
VARIANCES = {"A": 0.0, "B": 1.38, "C": 0.11375, "D": 0.18}
CHI_SQUARED = {"A": 0.0, "B": 0.337106, "C": 0.321664, "D": math.inf}


def weight(eps: np.ndarray, shift: float, rho: float) -> np.ndarray:
    """p(x, z) / q(z | x) / p(x) at z = mean + shift + sqrt(rho v) eps: only the first code of the linear model is wrong."""
    v = float(POSTERIOR_VARIANCE[0])
    away = shift / math.sqrt(v) + math.sqrt(rho) * eps  # in standard deviations of the posterior
    return np.asarray(np.sqrt(rho) * np.exp((np.square(eps) - np.square(away)) / 2))


def expected_gap(shift: float, rho: float, samples: int) -> float:
    """E log mean of K weights = integral over t > 0 of (e^-t - phi(t / K)^K) / t, phi(t) = E e^-tw: any K by two sums."""
    eps = np.linspace(-12, 12, 2001)
    mass = np.exp(-np.square(eps) / 2) * (eps[1] - eps[0]) / math.sqrt(2 * math.pi)
    w = weight(eps, shift, rho)
    log_t = np.linspace(-50, 60, 2201)  # dt / t = d log t; small weights are felt at large t
    t = np.exp(log_t)[:, None]
    # 1 - phi by expm1: near t = 0 the two terms are 1 but for a difference that counts.
    lacking = np.concatenate([-np.expm1(-part / samples * w) @ mass for part in np.array_split(t, 32)])
    with np.errstate(divide="ignore", under="ignore"):
        other = np.expm1(samples * np.log1p(-np.minimum(lacking, 1.0)))
    return float((np.expm1(-t[:, 0]) - other).sum() * (log_t[1] - log_t[0]))


@pytest.mark.parametrize("encoder", TABLE)
def test_quadrature_gives_the_table_for_every_number_of_samples(encoder):
    for samples, expected in zip(SAMPLES, TABLE[encoder], strict=True):
        assert expected_gap(*ENCODERS[encoder], samples) == pytest.approx(expected, abs=2e-9)


@pytest.mark.parametrize("encoder", TABLE)
def test_first_two_moments_of_the_weights_are_those_of_the_formulas(encoder):
    (shift, rho), v = ENCODERS[encoder], float(POSTERIOR_VARIANCE[0])
    a_squared = shift**2 / v
    assert -(rho + a_squared - 1 - math.log(rho)) / 2 == pytest.approx(TABLE[encoder][0], abs=1e-9)
    assert a_squared * rho + (1 - rho) ** 2 / 2 == pytest.approx(VARIANCES[encoder], abs=1e-9)
    if rho > 0.5:
        chi_squared = rho / math.sqrt(2 * rho - 1) * math.exp(a_squared / (2 * rho - 1)) - 1
        assert chi_squared == pytest.approx(CHI_SQUARED[encoder], abs=1e-6)
        assert -chi_squared / (2 * 5000) == pytest.approx(TABLE[encoder][-1], rel=2e-3, abs=1e-15)


def test_log_p_of_the_five_pictures():
    torch.testing.assert_close(log_p(pictures()), LOG_P, rtol=0, atol=1e-10)
    assert LOG_P.mean().item() == pytest.approx(-8.2567627280, abs=1e-10)
    c = W @ W.T + S2 * torch.eye(4, dtype=torch.float64)
    assert torch.logdet(c).item() == pytest.approx(math.log(3.4375), abs=1e-12)


class Nodes(Noise):
    """In place of noise, the nodes of a quadrature: a key is a row of the table, the k-th fold its k-th column."""

    table = torch.zeros(0, 0, 2)

    def folds(self, values: range) -> "Nodes":
        return Nodes(torch.cat([self.keys + k * len(Nodes.table) for k in values]))

    def normal(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        assert (stream, shape) == (LATENT, (2,))
        return Nodes.table.transpose(0, 1).flatten(0, 1)[self.keys]


def expected_bound(vae: VAE, samples: int, *, nodes: int = 60) -> tuple[Tensor, Tensor]:
    """E of the K-sample bound and E of its square, of the product's own code, by Gauss-Hermite nodes for each draw."""
    at, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(*[at] * samples).view(-1, samples)
    mass = torch.cartesian_prod(*[weights] * samples).view(-1, samples).prod(1)
    Nodes.table = torch.stack((grid, torch.full_like(grid, 0.3)), 2).repeat_interleave(5, 0)  # the second code is exact
    x = pictures(len(grid))
    found = importance_bound(vae, GaussianDensity(), x, Nodes(torch.arange(len(x))), samples=samples, chunk=1)
    bounds = found.log_likelihood.view(-1, 5)
    return mass @ bounds, mass @ (bounds - LOG_P).square()


@pytest.mark.parametrize("encoder", TABLE)
@pytest.mark.parametrize(("samples", "nodes"), [(1, 60), (2, 120)])
def test_expected_bound_is_that_of_theory_to_a_millionth(encoder, samples, nodes):
    mean, square = expected_bound(LinearVAE(encoder), samples, nodes=nodes)
    expected = LOG_P + TABLE[encoder][SAMPLES.index(samples)]
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6 if samples > 1 else 1e-9)
    if samples == 1:
        variance = square - (mean - LOG_P).square()
        torch.testing.assert_close(variance, torch.full_like(variance, VARIANCES[encoder]), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("encoder", TABLE)
def test_elbo_by_its_closed_form(encoder, dtype, tolerance):
    """E log p(x | z) - KL: the expected square of a linear function of z in closed form beside the product's own rate."""
    vae = LinearVAE(encoder, dtype=dtype)
    x = pictures(dtype=dtype)
    q = vae.encode(x)
    rate = kl(q, standard_normal(q.mean))
    away = (x.flatten(1) - vae.decode(q.mean).flatten(1)).double().square().sum(1)
    spread = ((2 * q.log_std.double()).exp() @ W.square().T).sum(1)
    distortion = (away + spread) / (2 * S2) + 2 * math.log(2 * math.pi * S2)
    expected = LOG_P + TABLE[encoder][0]
    torch.testing.assert_close(-(distortion + rate.double()), expected, rtol=0, atol=tolerance)


def test_float32_keeps_the_bound_to_a_ten_thousandth_of_a_nat_at_ten_thousand_nats():
    """Relative 1e-6: pictures a hundredfold, of more than 10,000 nats, and what a sum of that size leaves of 24 bits."""
    x = 100 * pictures()
    found = importance_bound(LinearVAE("A", dtype=torch.float32), GaussianDensity(), x.float(), noise(5), samples=64)
    torch.testing.assert_close(found.log_likelihood, log_p(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shift", "rho"), [(0.3, 1.4), (-0.05, 0.9), (0.1, 1.0)])
def test_other_encoders_and_other_numbers_of_samples_agree_with_quadrature(shift, rho, monkeypatch):
    """Beyond the table: z-scores of Monte Carlo against the integral."""
    monkeypatch.setitem(ENCODERS, "own", (shift, rho))
    copies, x = 4000, pictures(4000)
    for samples in (1, 3, 17, 64):
        gap = importance_bound(
            LinearVAE("own"), GaussianDensity(), x, noise(5 * copies), samples=samples
        ).log_likelihood
        gap = gap - LOG_P.repeat(copies)
        assert abs(gap.mean() - expected_gap(shift, rho, samples)) < 4 * gap.std() / math.sqrt(len(gap))


# Two stochastic layers: z2 ~ N(0, I), z1 | z2 ~ N(A z2, S1), x | z1 as in the linear model; A is diagonal, so that the
# exact posterior q(z1 | x) q(z2 | z1) is diagonal as well.
A, S1 = torch.tensor([1.5, 0.7], dtype=torch.float64), 0.4


class TwoLinearLayers(VAE):
    """Exact, or wrong in both posteriors."""

    latent_shape = (2,)

    def __init__(self, *, shifts: tuple[float, float] = (0.0, 0.0), rhos: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.shifts, self.rhos = shifts, rhos
        self.prior_variance = A.square() + S1  # of z1
        self.variance1 = 1 / (W.square().sum(0) / S2 + 1 / self.prior_variance)
        self.variance2 = 1 / (A.square() / S1 + 1)

    def encode(self, inputs: Tensor) -> Gaussian:
        mean = (inputs.flatten(1) - MU) @ (W * self.variance1 / S2) + self.shifts[0]
        return gaussian(mean, (self.rhos[0] * self.variance1).log().expand_as(mean) / 2)

    def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        lower = encoding.repeat(samples)
        z1 = lower.sample(noise.normal(LATENT + 1, (2,)))
        mean = z1 * A * self.variance2 / S1 + self.shifts[1]
        upper = gaussian(mean, (self.rhos[1] * self.variance2).log().expand_as(mean) / 2)
        z2 = upper.sample(noise.normal(LATENT, (2,)))
        prior = gaussian(A * z2, torch.full_like(z2, math.log(S1) / 2))
        layers = (Layer(upper, standard_normal(z2), z2), Layer(lower, prior, z1, analytic=False))
        return Inference(layers, self.decode(z1))

    def decode(self, z: Tensor) -> Tensor:
        return (MU + z @ W.T)[:, :, None, None]

    def log_p(self, x: Tensor) -> Tensor:
        covariance = W @ self.prior_variance.diag() @ W.T + S2 * torch.eye(4, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(MU, covariance).log_prob(x.flatten(1))

    def gap(self) -> float:
        """-KL(q || exact posterior) summed over both layers: the second is wrong alike for every z1."""
        total = 0.0
        for shift, rho, variance in zip(self.shifts, self.rhos, (self.variance1, self.variance2), strict=True):
            total -= float((rho + shift**2 / variance - 1 - math.log(rho)).sum()) / 2
        return total


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_exact_posterior_of_two_layers_gives_log_p_with_any_number_of_samples(samples):
    vae, x = TwoLinearLayers(), pictures()
    found = importance_bound(vae, GaussianDensity(), x, noise(5), samples=samples, chunk=10)
    torch.testing.assert_close(found.log_likelihood, vae.log_p(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.effective_samples, torch.full_like(LOG_P, samples), rtol=1e-5, atol=0)


WRONG = {
    "lower": TwoLinearLayers(shifts=(0.15, 0.0), rhos=(1.6, 1.0)),
    "upper": TwoLinearLayers(shifts=(0.0, -0.3), rhos=(1.0, 0.7)),
    "both": TwoLinearLayers(shifts=(0.1, 0.2), rhos=(1.4, 1.5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_elbo_of_two_layers_is_below_log_p_by_both_divergences(name):
    vae, copies = WRONG[name], 20_000
    x = pictures(copies)
    terms = NegativeELBO(vae, GaussianDensity())(x, noise(5 * copies).keys)
    gap = -terms.distortion - terms.rate - vae.log_p(x)
    assert abs(gap.mean() - vae.gap()) < 4 * gap.std() / math.sqrt(len(gap))


@pytest.mark.parametrize("vae", [*map(LinearVAE, "BCD"), *WRONG.values()], ids=[*"BCD", *WRONG])
def test_bounds_rise_with_the_number_of_samples_and_stay_below_log_p(vae):
    """ELBO <= IWAE-k <= IWAE-K <= log p(x) in expectation: each step up by many standard errors, none above the end."""
    copies, keys = 4000, noise(20_000)
    x = pictures(copies)
    terms = NegativeELBO(vae, GaussianDensity())(x, keys.keys)
    bounds = [-terms.distortion - terms.rate]
    bounds += [importance_bound(vae, GaussianDensity(), x, keys, samples=k).log_likelihood for k in (2, 8, 40)]
    for lower, higher in itertools.pairwise(bounds):
        assert z_score(higher - lower) > 3
    end = vae.log_p(x) if isinstance(vae, TwoLinearLayers) else LOG_P.repeat(copies)
    for bound in bounds:
        assert z_score(bound - end) < 3
    assert z_score(bounds[0] - end) < -10


def z_score(gap: Tensor) -> float:
    return float(gap.mean() / (gap.std() / math.sqrt(len(gap))))


# Real data.


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("VAEJOB_TEST_DATA")
    if not folder:
        pytest.skip("VAEJOB_TEST_DATA names no folder with mnist/ and cifar10/")
    return Path(folder)


def mnist(data: Path, split: str) -> np.ndarray:
    """uint8 [N, 784]."""
    raw = gzip.decompress((data / "mnist" / f"{split}-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(raw, dtype=np.uint8, offset=16).reshape(-1, 784)


@pytest.fixture(scope="module")
def start(data: Path) -> Tensor:
    """[1, 28, 28]: logits of the mean of the first 59,600 training images."""
    mean = torch.from_numpy(mnist(data, "train")[:59_600].astype(np.float64).mean(0) / 255)
    return Bernoulli().initial_parameters(mean.float().view(1, 28, 28))


def test_factorised_bernoulli_of_mnist(data: Path, start: Tensor) -> None:
    test = mnist(data, "t10k")
    drawn = np.random.Generator(np.random.PCG64(12345)).random((10_000, 784), dtype=np.float32) < test / np.float32(255)
    assert drawn.sum() == 1_038_818
    assert hashlib.md5(np.packbits(drawn).tobytes()).hexdigest() == "a8c146f1f4a77764a61ede0b80cc1433"
    levels = torch.from_numpy(drawn.astype(np.uint8)).view(-1, 1, 28, 28)
    nats = -Bernoulli().log_prob(start.expand(10_000, -1, -1, -1), levels).double()
    assert nats.mean().item() == pytest.approx(205.9661, abs=5e-5)
    p = torch.from_numpy(test / 255)
    q = start.double().sigmoid().flatten()
    assert -(p * q.log() + (1 - p) * (1 - q).log()).sum(1).mean().item() == pytest.approx(205.9593, abs=5e-5)
    noise_entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    assert noise_entropy.sum(1).mean().item() == pytest.approx(45.534, abs=5e-4)


def test_a_decoder_that_ignores_its_code_scores_the_factorised_bernoulli(data: Path, start: Tensor) -> None:
    """The whole path of evaluation, with its own binarisation: 205.9593 but for that draw, whose error is known."""
    vae = build_model(ModelConfig(), shape=(1, 28, 28), output_planes=1, seed=0)
    vae.set_output_bias(start)
    with torch.no_grad():
        for layer in (vae.output, vae.posterior):
            layer.weight.zero_()
    images = mnist(data, "t10k").reshape(-1, 1, 28, 28)
    blocks = [(ids, images[ids]) for ids in np.array_split(np.arange(10_000), 40)]
    config = LikelihoodConfig(pixels="bernoulli", binarize="dynamic")
    scorer = NegativeELBO(vae, Bernoulli(binarize="dynamic"))
    totals = evaluate(scorer, blocks, dims_per_image=784, config=config, device=torch.device("cpu"), samples=3)
    p = torch.from_numpy(images.reshape(-1, 784) / 255)
    variance = (p * (1 - p) * start.double().flatten().square()).sum()
    assert abs(totals.mean("distortion") - 205.9593) < 4 * math.sqrt(variance) / 10_000
    assert totals.rate_nats == 0
    assert totals.mean("negative_bound") == pytest.approx(totals.mean("distortion"), abs=1e-4)


def test_histogram_of_cifar10(data: Path) -> None:
    """One categorical for each channel, of the training images' levels: 7.893 bits/dim of the test images."""
    counts, held_out = (histograms(data / "cifar10" / f"jpeg-{split}.parquet") for split in ("train", "test"))
    logits = torch.from_numpy(counts / counts.sum(1, keepdims=True)).log().T.float()  # [256, 3]
    pixels = Categorical()
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, -1, -1)
    each = torch.stack([
        pixels.log_prob(logits[:, [c]].reshape(1, 256, 1, 1).expand(256, -1, -1, -1), every[:, :1]) for c in range(3)
    ])  # fmt: skip
    nats = -(torch.from_numpy(held_out / held_out.sum()) * each.double()).sum().item()
    assert bits_per_dim(nats, 1) == pytest.approx(7.893, abs=5e-4)


def histograms(path: Path) -> np.ndarray:
    """[3, 256]: how often each channel has each level."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for jpeg in pq.read_table(path, columns=["jpeg"])["jpeg"].to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
        for c in range(3):
            counts[c] += np.bincount(pixels[..., c].ravel(), minlength=256)
    return counts
