"""Likelihoods that others report, wrongly: each error is written out here, shown to break a property that a likelihood
must have, and ours is shown to have it. So the property is one that would catch the error.

The names are those of the projects in whose published code the error was read; each function is our own few lines.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_bounds import GAPS, LOG_P, GaussianDensity, LinearVAE, noise, pictures, random_images
from vaejob.config import LikelihoodConfig, ObjectiveConfig
from vaejob.likelihood.bounds import BoundTerms, NegativeELBO, combine_weights, importance_bound, objective
from vaejob.likelihood.levels import GreyLevels
from vaejob.likelihood.logistic import log_mass
from vaejob.likelihood.pixels import Bernoulli, ContinuousBernoulli, DiscretizedLogistic, total_mass
from vaejob.likelihood.pixels import GaussianDensity as GaussianPixels
from vaejob.likelihood.units import bits_per_dim
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.model.gaussian import Gaussian, kl
from vaejob.model.noise import LATENT, image_noise
from vaejob.training.evaluate import evaluate

# 1. Mass: the probabilities of all levels of a pixel sum to one.


def mass(probabilities: Callable[[Tensor], Tensor], levels: int) -> float:
    return float(probabilities(torch.arange(levels, dtype=torch.float64)).sum())


def our_mass(bits: int, mean: float, log_scale: float) -> float:
    return total_mass(DiscretizedLogistic(bits=bits), torch.tensor([mean, log_scale]).view(1, 2, 1, 1)).item()


def logistic_bins(x: Tensor, half: float, mean: float, log_scale: float, *, dark: Tensor, light: Tensor) -> Tensor:
    """The mass of [x - half, x + half] by a difference of sigmoids, of open bins where dark or light."""
    scale = math.exp(log_scale)
    low, high = ((x - half - mean) / scale).sigmoid(), ((x + half - mean) / scale).sigmoid()
    return torch.where(light, torch.ones_like(low), high) - torch.where(dark, torch.zeros_like(low), low)


@pytest.mark.parametrize(("log_scale", "expected"), [(-3.0, 1.028), (-4.0, 1.028), (-5.0, 1.06)])
def test_mass_catches_bins_that_overlap_at_5_bits(log_scale, expected):
    """VDVAE, Efficient-VDVAE: values 8 / 127.5 apart in bins that are 2 / 31 wide. 0.04 bits/dim are won."""

    def wrong(levels: Tensor) -> Tensor:
        x = levels * 8 / 127.5 - 1
        return logistic_bins(x, 1 / 31, 0.0353, log_scale, dark=levels == 0, light=levels == 31)  # between two bins

    assert mass(wrong, 32) == pytest.approx(expected, abs=0.01)
    assert our_mass(5, 0.0353, log_scale) == pytest.approx(1, abs=1e-5)


def test_mass_catches_a_threshold_that_never_meets_the_top_level():
    """VDVAE at 5 bits: white is 248 / 127.5 - 1 = 0.945, which is not above 0.999: its open bin is lost."""

    def wrong(levels: Tensor) -> Tensor:
        x = levels * 8 / 127.5 - 1
        return logistic_bins(x, 1 / 31, 1.05, -4.0, dark=x < -0.999, light=x > 0.999)

    assert mass(wrong, 32) < 0.5
    assert our_mass(5, 1.05, -4.0) == pytest.approx(1, abs=1e-5)


def test_mass_catches_a_threshold_that_takes_254_for_white():
    """NVAE at 8 bits: 2 * 254 / 255 - 1 = 0.9922 is above 0.99, so the open bin counts twice."""

    def wrong(levels: Tensor) -> Tensor:
        x = 2 * levels / 255 - 1
        return logistic_bins(x, 1 / 255, 1.1, -5.0, dark=x < -0.999, light=x > 0.99)

    assert mass(wrong, 256) == pytest.approx(1.99, abs=0.02)
    assert our_mass(8, 1.1, -5.0) == pytest.approx(1, abs=1e-5)


def test_mass_catches_ends_without_open_bins():
    """vae_vampprior: bins [x, x + 1/256] alone, so what lies beyond either end is lost."""

    def wrong(levels: Tensor) -> Tensor:
        x, scale = levels / 256, math.exp(-3.0)
        return ((x + 1 / 256 - 0.02) / scale).sigmoid() - ((x - 0.02) / scale).sigmoid() + 1e-7

    assert 0.44 < mass(wrong, 256) < 0.95
    assert our_mass(8, -0.96, -3.0) == pytest.approx(1, abs=1e-5)


def test_mass_catches_a_density_in_place_of_a_narrow_bin():
    """PixelCNN++ where the bin's mass is small: the density at its middle times its width, 2 nats off at a scale of e^-7."""

    def wrong(levels: Tensor) -> Tensor:
        x, inverse = 2 * levels / 255 - 1, math.exp(7.0)
        exact = logistic_bins(x, 1 / 255, 0.0, -7.0, dark=levels == 0, light=levels == 255)
        middle = (x * inverse).sigmoid() * (-x * inverse).sigmoid() * inverse * 2 / 255
        return torch.where(exact > 1e-5, exact, middle)

    exact = log_mass(torch.zeros(()).double(), torch.tensor(-7.0).double(), torch.tensor(125), count=256).item()
    at_125 = wrong(torch.tensor([125.0], dtype=torch.float64)).log().item()
    ours = DiscretizedLogistic().log_prob(torch.tensor([0.0, -7.0]).view(1, 2, 1, 1), levels_of(125)).item()
    assert abs(at_125 - exact) > 2
    assert ours == pytest.approx(exact, rel=1e-4)


def test_known_values_catch_a_floor_under_probabilities():
    """log(p + 1e-12): no level costs more than 27.6 nats, however unlikely."""
    wrong = math.log(1e-12)
    ours = DiscretizedLogistic().log_prob(torch.tensor([-1.0, -7.0]).view(1, 2, 1, 1), levels_of(255)).item()
    assert wrong > -28
    assert ours == pytest.approx(-2188.965794667002, rel=1e-5)


def levels_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


def integral(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))
    density = log_density(low + (high - low) * (nodes + 1) / 2).exp()
    return float((density * weights).sum() * (high - low) / 2)


def test_mass_catches_cross_entropy_of_grey_values():
    """pythae and many others: x log p + (1 - x) log(1 - p) of grey x is no density: the constant is missing."""
    for logit in (0.0, 2.0, -4.0):
        p = torch.tensor(logit, dtype=torch.float64).sigmoid()
        wrong = integral(lambda x, p=p: x * p.log() + (1 - x) * (1 - p).log(), 0.0, 1.0)
        assert wrong < 0.6
        assert total_mass(ContinuousBernoulli(), torch.tensor([logit]).view(1, 1, 1, 1)).item() == pytest.approx(
            1, abs=1e-5
        )


def test_mass_catches_squared_errors_without_their_constant():
    """pythae's training loss "mse": -|x - m|^2 / 2 is a Gaussian without 1/2 log 2 pi for each pixel."""
    wrong = integral(lambda x: -x.square() / 2, -12.0, 12.0)
    assert wrong == pytest.approx(math.sqrt(2 * math.pi))
    assert total_mass(GaussianPixels(), torch.tensor([0.0, 0.0]).view(1, 2, 1, 1)).item() == pytest.approx(1, abs=1e-5)


def test_mass_catches_a_mean_over_pixels():
    """PyTorch-VAE: mean squared error over pixels: two pixels that are independent no longer multiply."""
    grid = torch.cartesian_prod(torch.arange(4, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8)).view(
        16, 1, 1, 2
    )
    parameters = torch.tensor([0.3, -0.5, -1.0, -1.5]).view(1, 2, 1, 2).expand(16, -1, -1, -1)
    nats = DiscretizedLogistic(bits=2).log_prob(parameters, grid)
    assert (nats / 2).exp().sum() > 2
    assert nats.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_company_catches_a_scale_that_is_guessed_from_the_batch():
    """dvp_vae: values are mapped to [-1, 1] if the batch has none below 0: a batch without dark pixels is another one."""

    def wrong(x: Tensor) -> Tensor:
        return 2 * x - 1 if x.min() >= 0 else x

    grey, dark = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    assert not torch.equal(wrong(grey), wrong(torch.cat((grey, dark)))[:1])
    ours = GreyLevels()
    assert torch.equal(ours.to_inputs(levels_of(200)), ours.to_inputs(levels_of(200, 0))[:1])


# 2. Bounds: below log p(x), and by exactly as much as theory says.

SAMPLES = 50


def weights_of(encoder: str, copies: int, samples: int) -> tuple[Tensor, Tensor]:
    """[K, B] log-weights of the linear model, and the true log p(x) of each image."""
    vae, x, pixels = LinearVAE(encoder), pictures(copies), GaussianDensity()
    inference = vae.draw(vae.encode(x), noise(5 * copies).folds(range(samples)), samples=samples)
    (layer,) = inference.layers
    log_w = pixels.log_prob(inference.parameters, x.repeat(samples, 1, 1, 1))
    log_w = log_w + layer.prior.log_prob(layer.z) - layer.posterior.log_prob(layer.z)
    return log_w.view(samples, -1), LOG_P.repeat(copies)


def z_score(bounds: Tensor, expected: Tensor | float) -> float:
    """How many standard errors the mean is above what it should be."""
    gap = bounds - expected
    return float(gap.mean() / (gap.std() / math.sqrt(len(gap))))


def our_bounds(encoder: str, copies: int, samples: int) -> Tensor:
    return importance_bound(
        LinearVAE(encoder), GaussianDensity(), pictures(copies), noise(5 * copies), samples=samples
    ).log_likelihood


def test_log_p_catches_a_divergence_in_closed_form_inside_the_logarithm():
    """dvp_vae, boiler with --analytical-kl: E log p(x|z) - KL within logsumexp is no bound."""
    vae, x, copies = LinearVAE("B"), pictures(2000), 2000
    inference = vae.draw(vae.encode(x), noise(5 * copies).folds(range(SAMPLES)), samples=SAMPLES)
    (layer,) = inference.layers
    wrong = GaussianDensity().log_prob(inference.parameters, x.repeat(SAMPLES, 1, 1, 1))
    wrong = (wrong - kl(layer.posterior, layer.prior)).view(SAMPLES, -1).logsumexp(0) - math.log(SAMPLES)
    assert z_score(wrong, LOG_P.repeat(copies)) > 10
    assert z_score(our_bounds("B", copies, SAMPLES), LOG_P.repeat(copies)) < 4


@pytest.mark.parametrize("encoder", ["B", "C", "D"])
def test_log_p_catches_the_training_loss_in_place_of_the_bound(encoder):
    """pythae's IWAE: sum w~ log w has the right gradient; as a number it is log K - H(w~) above the bound."""
    log_w, log_p = weights_of(encoder, 2000, SAMPLES)
    wrong = (log_w.softmax(0) * log_w).sum(0)
    bound = our_bounds(encoder, 2000, SAMPLES)
    assert (wrong >= bound - 1e-9).all()
    assert z_score(wrong, log_p) > 10
    assert abs(z_score(bound, log_p + GAPS[encoder][SAMPLES])) < 4


def test_exact_posterior_catches_more_draws_than_are_counted():
    """scvi: 300 are drawn four times for a thousand, whose logarithm is subtracted: log(1200 / 1000) = 0.18 nats are won."""
    log_w, log_p = weights_of("A", 1, 1200)
    wrong = log_w.logsumexp(0) - math.log(1000)
    torch.testing.assert_close(wrong - log_p, torch.full_like(log_p, math.log(1.2)), rtol=0, atol=1e-8)
    found = importance_bound(LinearVAE("A"), GaussianDensity(), pictures(), noise(5), samples=1000, chunk=300)
    torch.testing.assert_close(found.log_likelihood, LOG_P, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("asked", "drawn"), [(2, 100), (150, 100), (250, 200)])
def test_theory_catches_another_number_of_draws_than_was_asked_for(asked, drawn):
    """pythae's get_nll: 100 for fewer, and hundreds rounded down for more: a bound of another K under the name of this one."""
    assert (100 if asked <= 100 else asked // 100 * 100) == drawn
    found: list[int] = []

    class Counted(LinearVAE):
        def decode(self, z: Tensor) -> Tensor:
            found.append(len(z))
            return super().decode(z)

    importance_bound(Counted("B"), GaussianDensity(), pictures()[:1], noise(1), samples=asked, chunk=100)
    assert sum(found) == asked != drawn
    if asked in GAPS["B"]:
        log_w, log_p = weights_of("B", 2000, drawn)
        wrong = log_w.logsumexp(0) - math.log(drawn)
        assert z_score(wrong, log_p + GAPS["B"][asked]) > 10
        assert abs(z_score(our_bounds("B", 2000, asked), log_p + GAPS["B"][asked])) < 4


def test_theory_catches_a_mean_over_images_inside_the_logarithm():
    """Of wrong axes: log-mean-exp over the batch, or over a whole batch at once; then the images' own bounds are lost."""
    log_w, log_p = weights_of("C", 2000, 5)
    expected = log_p + GAPS["C"][5]
    assert abs(z_score(our_bounds("C", 2000, 5), expected)) < 4
    wrong = (log_w.logsumexp(1) - math.log(log_w.shape[1])).mean()
    assert abs(wrong - expected.mean()) > 1
    assert log_w.logsumexp((0, 1)) - math.log(log_w.numel()) - expected.mean() > 1


def test_theory_catches_a_mean_of_logarithms():
    """The mean of K log-weights is the ELBO, whatever K is."""
    log_w, log_p = weights_of("B", 2000, 10)
    assert z_score(log_w.mean(0), log_p + GAPS["B"][10]) < -10
    assert abs(z_score(our_bounds("B", 2000, 10), log_p + GAPS["B"][10])) < 4


def test_finite_differences_catch_weights_that_prefer_the_worst_sample():
    """PyTorch-VAE: softmax of +loss. Near one good and one bad sample, the derivative of the bound is that of the good one."""
    log_w = torch.tensor([-1.0, -6.0], dtype=torch.float64)
    numeric = [
        (((log_w + step).logsumexp(0) - (log_w - step).logsumexp(0)) / 2e-6).item()
        for step in (torch.tensor([1e-6, 0.0]).double(), torch.tensor([0.0, 1e-6]).double())
    ]
    wrong, right = (-log_w).softmax(0).tolist(), log_w.softmax(0).tolist()
    assert right == pytest.approx(numeric, abs=1e-8)
    assert abs(wrong[0] - numeric[0]) > 0.9
    scorer, levels = random_images(3)
    bound = scorer(levels, noise(3).keys, ObjectiveConfig(bound="iwae", samples=5)).negative_bound
    assert bound is not None
    (ours,) = torch.autograd.grad(bound.sum(), scorer.vae.output.bias)
    inference = scorer.vae.draw(scorer.vae.encode(scorer.pixels.to_inputs(levels)), noise(3).folds(range(5)), samples=5)
    nats = scorer.pixels.log_prob(inference.parameters, levels.repeat(5, 1, 1, 1))
    log_w = nats + sum(layer.prior.log_prob(layer.z) - layer.posterior.log_prob(layer.z) for layer in inference.layers)
    for weights, agrees in ((log_w.view(5, 3).softmax(0), True), ((-log_w.view(5, 3)).softmax(0), False)):
        (gradient,) = torch.autograd.grad(
            -(weights.detach() * nats.view(5, 3)).sum(), scorer.vae.output.bias, retain_graph=True
        )
        assert torch.allclose(gradient, ours, rtol=1e-3, atol=1e-4) == agrees


def test_large_values_catch_weights_that_are_not_shifted_first():
    """BIVA's effective sample size: exp of -10,000 nats is 0, and 0 / 0 is nothing."""
    log_w = -1e4 + torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    w = log_w.exp()
    assert (w.sum(0).square() / w.square().sum(0)).isnan().all()
    shifted = (log_w + 1e4).exp()
    found = combine_weights(log_w)
    torch.testing.assert_close(found.effective_samples, shifted.sum(0).square() / shifted.square().sum(0))
    torch.testing.assert_close(found.log_likelihood, shifted.mean(0).log() - 1e4)


def test_torch_catches_a_variance_in_place_of_a_deviation():
    """PyTorch-VAE: eps = (z - mu) / log_var; of swaps of log variance, variance and deviation alike."""
    q, z = Gaussian(torch.tensor([[0.3]]), torch.tensor([[-0.7]])), torch.tensor([[1.1]])
    exact = torch.distributions.Normal(q.mean, q.log_std.exp()).log_prob(z).sum()
    for wrong_eps in (
        (z - q.mean) / (2 * q.log_std),
        (z - q.mean) / (2 * q.log_std).exp(),
        (z - q.mean) * q.log_std.exp(),
    ):
        wrong = -(wrong_eps.square() / 2 + q.log_std + math.log(2 * math.pi) / 2).sum()
        assert abs(wrong - exact) > 0.1
    torch.testing.assert_close(q.log_prob(z)[0], exact)


def test_quadrature_catches_densities_without_their_constant():
    """1/2 log 2 pi cancels between prior and posterior, but only where both have it."""
    q = Gaussian(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert integral(lambda z: -z.square() / 2, -12, 12) > 2.5
    assert integral(lambda z: q.log_prob(z[:, None]), -12, 12) == pytest.approx(1)


def test_objective_and_bound_are_two_numbers():
    """bolts, PyTorch-VAE, NVAE: the reported "ELBO" is the objective, with its weight of the rate or its free bits."""
    terms = BoundTerms(torch.tensor([10.0]), torch.tensor([[4.0, 0.2]]))
    for settings in ({"beta": 0.1, "free_bits_nats": 0.0}, {"beta": 1.0, "free_bits_nats": 0.5}):
        assert objective(terms, **settings).item() != pytest.approx(14.2)
        running = RunningTotals(dims_per_image=4, device="cpu")
        running.add(terms)
        assert running.to_host().mean("negative_bound") == pytest.approx(14.2, abs=1e-4)


# 3. Aggregation: each image once, by one division.

NATS = np.random.default_rng(0).normal(100, 12, size=1003)
SHARDS = np.split(NATS, [500, 900, 990, 1000])


def our_mean(parts: list[np.ndarray]) -> float:
    totals = []
    for part in parts:
        running = RunningTotals(dims_per_image=1, device="cpu")
        running.add(BoundTerms(torch.from_numpy(part), torch.zeros(len(part), 1, dtype=torch.float64)))
        totals.append(running.to_host())
    whole = sum(totals, LikelihoodTotals())
    assert whole.images == sum(map(len, parts))
    return whole.mean("negative_bound")


def drop_last(nats: np.ndarray) -> float:
    """Efficient-VDVAE, VDVAE: the rest of the images makes no full batch."""
    return float(nats[: len(nats) // 32 * 32].mean())


def mean_of_batch_means(nats: np.ndarray) -> float:
    """vae_vampprior, pythae: the last batch of 3 counts as much as one of 100."""
    return float(np.mean([nats[i : i + 100].mean() for i in range(0, len(nats), 100)]))


def mean_of_rank_means(nats: np.ndarray) -> float:
    """NVAE, Open-Sora, with streamed shards of unequal sizes."""
    return float(np.mean([part.mean() for part in SHARDS]))


def padded(nats: np.ndarray) -> float:
    """Lightning, scvi: eight ranks of equal length; the first images are seen twice."""
    return float(np.concatenate((nats, nats[: -len(nats) % 8])).mean())


def first_rank_alone(nats: np.ndarray) -> float:
    """Efficient-VDVAE's validation, diffusers' log: no reduction."""
    return float(nats[::4].mean())


def repeated_stream(nats: np.ndarray) -> float:
    """vdm: a fixed number of batches out of a stream that starts over."""
    return float(np.concatenate((nats, nats))[:1280].mean())


def truncated_count(nats: np.ndarray) -> float:
    """Lightning on gloo: the mean count of images per rank is cut to an integer."""
    return float(nats.sum() / len(SHARDS) / (len(nats) // len(SHARDS)))


WRONG = [drop_last, mean_of_batch_means, mean_of_rank_means, padded, first_rank_alone, repeated_stream, truncated_count]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_one_mean_for_any_split_catches(wrong):
    """Ours is the same to the last bit for any split, and the plain mean to the grid of 2^-16 that images are rounded to."""
    whole = our_mean([NATS])
    assert whole == pytest.approx(NATS.mean(), abs=2.0**-17)
    assert abs(wrong(NATS) - NATS.mean()) > 1e-3
    for parts in (SHARDS, np.array_split(NATS, 7), [*SHARDS, np.empty(0)], [NATS[::2], NATS[1::2]]):
        assert our_mean(list(parts)) == whole


def test_a_division_catches_images_left_out_because_they_are_not_finite():
    """VDVAE's filtered_elbo: the mean of what is left looks fine."""
    nats = torch.tensor([90.0, math.nan, 110.0])
    assert nats[nats.isfinite()].mean() == 100
    running = RunningTotals(dims_per_image=1, device="cpu")
    running.add(BoundTerms(nats, torch.zeros(3, 1)))
    with pytest.raises(ArithmeticError, match="1 of 3 images"):
        running.to_host().mean("negative_bound")


def test_worker_counts_catch_binarisation_by_a_workers_own_generator():
    """NVAE, Efficient-VDVAE: the test images are drawn binary from the rank's generator, so their number depends on it."""
    images = np.random.default_rng(1).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)

    def wrong(ranks: int) -> int:
        parts = [(rank, images[rank::ranks]) for rank in range(ranks)]
        return sum(int((np.random.default_rng(rank).random(part.shape) < part / 255).sum()) for rank, part in parts)

    assert len({wrong(ranks) for ranks in (1, 2, 3)}) == 3
    scorer, _ = random_images(0)
    scorer = NegativeELBO(scorer.vae, Bernoulli(binarize="dynamic"))
    config = LikelihoodConfig(pixels="bernoulli", binarize="dynamic")
    blocks = [(ids, images[ids]) for ids in np.array_split(np.arange(40), 4)]
    found = [
        sum(
            (
                evaluate(scorer, blocks[rank::ranks], dims_per_image=64, config=config, device=torch.device("cpu"))
                for rank in range(ranks)
            ),
            LikelihoodTotals(),
        )
        for ranks in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]


def test_ids_catch_noise_that_depends_on_the_batch():
    """A stateful generator gives an image other codes in another batch."""

    def wrong(ids: list[int]) -> Tensor:
        return torch.randn(len(ids), 5, generator=torch.Generator().manual_seed(0))

    def ours(ids: list[int]) -> Tensor:
        return image_noise(np.array(ids), seed=0, purpose="evaluate", device="cpu").normal(LATENT, (5,))

    for one, other in itertools.permutations(([3, 1, 2], [2], [2, 3]), 2):
        common = sorted({*one} & {*other})
        rows = [[ids.index(i) for i in common] for ids in (one, other)]
        assert torch.equal(ours(one)[rows[0]], ours(other)[rows[1]])
    assert not torch.equal(wrong([3, 1, 2])[2:], wrong([2]))


# 4. Units: a uniform mass over 256 levels is 8 bits per dimension.

UNIFORM_NATS = 784 * math.log(256)


@pytest.mark.parametrize(
    "wrong",
    [
        UNIFORM_NATS / 784,
        UNIFORM_NATS / (1024 * math.log(2)),
        UNIFORM_NATS / (3 * 784 * math.log(2)),
        UNIFORM_NATS / math.log(2),
    ],
    ids=["nats for bits", "cropped pixels counted", "channels counted twice", "not divided by the dimensions"],
)
def test_a_uniform_mass_catches(wrong):
    assert abs(wrong - 8) > 1
    assert bits_per_dim(UNIFORM_NATS, 784) == pytest.approx(8, abs=1e-12)
    uniform = F.softplus(torch.zeros(())).item()  # one bit for each pixel of a fair coin
    assert bits_per_dim(784 * uniform, 784) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [0.0, 8.0, 7.0], ids=["no correction", "that of x / 256", "that of [-1, 1] in x / 256"]
)
def test_a_flat_density_catches(wrong):
    """On [0, 1] with x = level / 255 a bin is 1 / 255 wide: a density of 1 is log2 255 bits of a mass."""
    flat = ContinuousBernoulli().log_prob(torch.zeros(1, 1, 1, 1), levels_of(77)).item()
    right = bits_per_dim(-flat, 1) + ContinuousBernoulli().density_bits_correction
    assert flat == pytest.approx(0, abs=1e-6)
    assert right == pytest.approx(-math.log2(1 / 255), abs=1e-6)
    assert abs(bits_per_dim(-flat, 1) + wrong - right) > 5e-3
