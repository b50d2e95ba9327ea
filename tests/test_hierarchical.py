"""The ladder of codes: a likelihood that sums to one, bounds below it, and images that do not notice one another."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.likelihood.bounds import NegativeELBO, importance_bound, objective
from vaejob.likelihood.pixels import Bernoulli, DiscretizedLogistic
from vaejob.model import build_model
from vaejob.model.gaussian import kl
from vaejob.model.hierarchical import HierarchicalVAE
from vaejob.model.noise import Noise, image_noise


def build(layers: str, *, shape=(1, 8, 8), planes=1, width=8, latent_channels=2, seed=0, lively=0.0) -> HierarchicalVAE:
    """lively > 0: all weights drawn with that gain, the zero ones too, so that every code moves what is below it."""
    config = ModelConfig(family="hierarchical", layers=layers, width=width, latent_channels=latent_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = HierarchicalVAE(config, shape=shape, output_planes=planes)
        for weight in vae.parameters() if lively else ():
            nn.init.normal_(weight, std=lively / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.3 * lively)
    return vae


def noise(images: int, *, seed: int = 0) -> Noise:
    return image_noise(np.arange(images), seed=seed, purpose="evaluate", device="cpu")


def binary(images: int, *, shape=(1, 8, 8)) -> Tensor:
    return (noise(images).uniform(0, shape) < 0.4).to(torch.uint8)


def all_2x2() -> Tensor:
    return torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "layers", "blocks"),
    [
        ((1, 28, 28), "1x1,4x2,7x1,14x2,28x1", 7),
        ((3, 32, 32), "1x1, 4x2, 8x3, 16x1, 32x1", 8),
        ((3, 64, 64), "4x1,16x2,64x1", 4),
        ((1, 7, 7), "1x2,2x1,5x1,7x1", 5),
        ((3, 1, 1), "1x3", 3),
    ],
)
def test_every_block_draws_a_code_of_its_resolution_from_the_top_down(shape, layers, blocks):
    vae = build(layers, shape=shape, planes=2 * shape[0], latent_channels=3)
    inference = vae.infer(torch.rand(2, *shape), noise(2))
    sizes = [int(size) for size, count in (part.split("x") for part in layers.split(",")) for _ in range(int(count))]
    assert [tuple(layer.z.shape) for layer in inference.layers] == [(2, 3, size, size) for size in sizes]
    assert len(sizes) == blocks
    assert inference.parameters.shape == vae.generate(noise(2)).shape == (2, 2 * shape[0], *shape[1:])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("1x1;8x2", r"'1x1;8x2'; it must read size x count"),
        ("", r"''; it must read size x count"),
        ("1x1,8", r"it must read size x count"),
        ("1x1,-8x2", r"it must read size x count"),
        ("1x0,8x2", r"every size and every count must be at least 1"),
        ("0x1,8x2", r"every size and every count must be at least 1"),
        ("4x1,1x1,8x2", r"sizes must grow, but 1 follows 4"),
        ("4x1,4x1,8x2", r"sizes must grow, but 4 follows 4"),
        ("1x1,4x2", r"its last size must be that of the pictures, 8"),
        ("1x1,16x2", r"its last size must be that of the pictures, 8"),
    ],
)
def test_impossible_ladders_are_refused_in_one_line(layers, message):
    with pytest.raises(ConfigError, match=f"model.layers is .*{message}") as refusal:
        build(layers)
    assert "\n" not in str(refusal.value)


def test_pictures_that_are_not_square_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"model.family is hierarchical and pictures are 8 x 9; they must be square$"):
        build("1x1,8x2", shape=(1, 8, 9))


def test_every_weight_takes_part():
    scorer = NegativeELBO(build("1x2,2x1,3x1,9x2", shape=(1, 9, 9)), Bernoulli())
    optimizer = torch.optim.SGD(scorer.parameters(), lr=1e-3)
    assert sum(p.numel() for p in scorer.parameters()) > 0
    for step in range(4):  # the state and the last convolutions of priors start at zero, and let others in one by one
        objective(scorer(binary(4, shape=(1, 9, 9)), noise(4).keys), beta=1.0, free_bits_nats=0.0).sum().backward()
        assert all(p.grad is not None for p in scorer.parameters())
        without = [name for name, p in scorer.named_parameters() if not p.grad.any()]
        assert step < 3 or not without, without
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of 1x1 convolutions, where they mean the same
def test_ddp_takes_the_graph_for_static():
    """Without a search for unused weights, which DDP would miss in the second step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        scorer = NegativeELBO(build("1x1,4x1,8x1"), Bernoulli())
        for settings in ({"static_graph": True}, {}):
            model = nn.parallel.DistributedDataParallel(scorer, gradient_as_bucket_view=True, **settings)
            for _ in range(3):
                objective(model(binary(4), noise(4).keys), beta=1.0, free_bits_nats=0.0).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_rank_without_images_contributes_nothing():
    scorer = NegativeELBO(build("1x1,3x1,4x1,8x1"), Bernoulli())
    objective(scorer(binary(0), noise(0).keys), beta=1.0, free_bits_nats=0.0).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())
    assert importance_bound(scorer.vae, scorer.pixels, binary(0), noise(0), samples=3).log_likelihood.shape == (0,)


def test_training_starts_at_a_standard_normal_prior_and_almost_no_rate():
    vae = build("1x1,4x2,7x2,14x2,28x1", shape=(1, 28, 28), width=16)
    x, dims = binary(5, shape=(1, 28, 28)), sum(math.prod(shape) for shape in vae.code_shapes)
    layers, _ = vae.infer(x.float(), noise(5))
    assert not any(one.any() for layer in layers for one in layer.prior)
    rates = NegativeELBO(vae, Bernoulli())(x, noise(5).keys).rate
    assert 0 < rates.min() <= rates.max() < 0.01 * dims  # nats


def test_equal_branches_have_no_rate():
    vae = build("1x1,4x2,8x1", lively=1.0)
    for name, module in vae.named_modules():
        if name.endswith((".prior.7", ".posterior.7")):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 0.5)
    layers, _ = vae.infer(binary(4).float(), noise(4))
    assert all(torch.equal(*pair) for layer in layers for pair in zip(layer.posterior, layer.prior, strict=True))
    assert not NegativeELBO(vae, Bernoulli())(binary(4), noise(4).keys).rate.any()


def test_scales_stay_bounded():
    vae = build("1x1,4x2,8x1", latent_channels=2)
    for name, module in vae.named_modules():
        if name.endswith((".prior.7", ".posterior.7")):
            nn.init.constant_(module.bias[2:4], 1000 if "posterior" in name else -1000)
    layers, _ = vae.infer(binary(4).float(), noise(4))
    assert all(((layer.posterior.log_std == 5) & (layer.prior.log_std == -5)).all() for layer in layers)
    assert NegativeELBO(vae, Bernoulli())(binary(4), noise(4).keys).rate.isfinite().all()


def test_an_image_scores_the_same_in_any_company():
    scorer = NegativeELBO(build("1x1,4x2,8x1", lively=1.0), Bernoulli())
    levels, keys = binary(8), noise(8).keys
    whole, alone = scorer(levels, keys), [scorer(levels[[i]], keys[[i]]) for i in range(8)]
    torch.testing.assert_close(torch.cat([one.distortion for one in alone]), whole.distortion, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([one.layer_rates for one in alone]), whole.layer_rates, rtol=0, atol=1e-4)
    bounds = [
        importance_bound(scorer.vae, scorer.pixels, levels[some], Noise(keys[some]), samples=9, chunk=chunk)
        for some, chunk in ((slice(None), 4), ([6, 1], 9))
    ]
    torch.testing.assert_close(bounds[1].log_likelihood, bounds[0].log_likelihood[[6, 1]], rtol=0, atol=1e-4)


def test_draws_are_laid_end_to_end():
    vae = build("1x1,4x2,8x1", lively=1.0)
    encoding = vae.encode(binary(3).float())
    layers, together = vae.draw(encoding, noise(3).folds(range(4)), samples=4)
    apart = [vae.draw(encoding, noise(3).fold(k)) for k in range(4)]
    torch.testing.assert_close(together, torch.cat([one.parameters for one in apart]))
    for layer, singles in zip(layers, zip(*(one.layers for one in apart), strict=True), strict=True):
        torch.testing.assert_close(layer.z, torch.cat([single.z for single in singles]))


def test_log_ratios_of_codes_average_to_the_divergence_of_each_layer():
    vae, draws = build("1x1,3x1,4x2", shape=(1, 4, 4), lively=0.8), 4000
    layers, _ = vae.draw(vae.encode(binary(3, shape=(1, 4, 4)).float()), noise(3).folds(range(draws)), samples=draws)
    assert len(layers) == 4
    for layer in layers:
        found = layer.posterior.log_prob(layer.z) - layer.prior.log_prob(layer.z)
        expected = kl(layer.posterior, layer.prior)
        assert expected.min() > 1e-3
        gap = (found - expected).double()
        assert gap.mean().abs() < 4 * gap.std() / math.sqrt(len(gap))


def test_more_samples_tighten_the_bound():
    scorer, levels = NegativeELBO(build("1x1,4x1,8x1", lively=0.6), Bernoulli()), binary(200)
    terms = scorer(levels, noise(200).keys)
    bounds = [(-terms.distortion - terms.rate).mean().item()] + [
        importance_bound(scorer.vae, scorer.pixels, levels, noise(200), samples=k).log_likelihood.mean().item()
        for k in (5, 30)
    ]
    assert bounds == sorted(bounds)


TINY = {"layers": "1x1,2x1", "shape": (1, 2, 2), "latent_channels": 1, "lively": 1.0}


@torch.no_grad()
def test_probabilities_of_all_pictures_sum_to_one():
    """exp of the importance bound is unbiased for p(x): 400 independent estimates of each of the 16."""
    vae, x, copies = build(**TINY), all_2x2().repeat(400, 1, 1, 1), 400
    bound = importance_bound(vae, Bernoulli(), x, noise(len(x)), samples=64).log_likelihood
    mass = bound.exp().view(copies, 16).sum(1)
    error = mass.std() / math.sqrt(copies)
    assert error < 0.01
    assert abs(mass.mean() - 1) < 4 * error


@torch.no_grad()
def test_bounds_stay_below_the_likelihood_that_prior_samples_give():
    vae, pixels, draws = build(**TINY), Bernoulli(), 100_000
    parameters = vae.generate(noise(draws, seed=1))
    p = torch.stack([pixels.log_prob(parameters, x.expand(draws, 1, 2, 2)).double().exp() for x in all_2x2()])
    log_p, error = p.mean(1).log(), p.std(1) / p.mean(1) / math.sqrt(draws)
    assert error.max() < 0.01
    assert p.std(1).div(p.mean(1)).min() > 0.2  # the codes matter
    copies = 300
    x, keys = all_2x2().repeat(copies, 1, 1, 1), noise(16 * copies)
    terms = NegativeELBO(vae, pixels)(x, keys.keys)
    several = importance_bound(vae, pixels, x, keys, samples=50).log_likelihood
    previous = torch.full_like(log_p, -math.inf)
    for bound in (-terms.distortion - terms.rate, several):
        found = bound.double().view(copies, 16)
        assert (found.mean(0) < log_p + 4 * torch.hypot(error, found.std(0) / math.sqrt(copies))).all()
        assert (found.mean(0) > previous).all()
        previous = found.mean(0)
    assert (log_p - previous).max() < 0.1  # 50 samples come close


def test_training_learns_more_than_the_mean_picture():
    """One half of the picture is lit: log 4 = 1.4 nats say which, and pixel by pixel it costs 64 log 2 = 44.4."""
    halves = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    halves[0, :, :4], halves[1, :, 4:], halves[2, :, :, :4], halves[3, :, :, 4:] = 1, 1, 1, 1
    levels = halves.repeat(16, 1, 1, 1)
    scorer = NegativeELBO(build("1x1,4x1,8x1", width=16), Bernoulli())
    scorer.vae.set_output_bias(scorer.pixels.initial_parameters(levels.float().mean(0)))
    optimizer = torch.optim.Adamax(scorer.parameters(), lr=1e-2)
    history = []
    for step in range(120):
        terms = scorer(levels, image_noise(np.arange(64), seed=0, purpose="train", epoch=step, device="cpu").keys)
        nats = (terms.distortion + terms.rate).mean()
        nats.backward()
        history.append(nats.item())
        nn.utils.clip_grad_norm_(scorer.parameters(), 200)
        optimizer.step()
        optimizer.zero_grad()
    assert 44 < history[0] < 47
    assert sum(history[-10:]) / 10 < 20


def test_autocast_stays_close_to_float32_and_gives_float32_nats():
    for pixels, planes in ((Bernoulli(), 1), (DiscretizedLogistic(), 2)):
        scorer = NegativeELBO(build("1x1,4x2,8x1", planes=planes, lively=0.8), pixels)
        wide = scorer(binary(8), noise(8).keys)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = scorer(binary(8), noise(8).keys)
        assert found.distortion.dtype == found.rate.dtype == torch.float32
        torch.testing.assert_close(found.distortion, wide.distortion, rtol=0.05, atol=0)
        torch.testing.assert_close(found.rate, wide.rate, rtol=0.05, atol=0)
        objective(found, beta=1.0, free_bits_nats=0.0).sum().backward()
        assert all(p.grad.isfinite().all() for p in scorer.parameters())


def test_channels_last_gives_the_same_terms():
    scorer = NegativeELBO(build("1x1,3x1,4x2,8x1", lively=0.8), Bernoulli())
    plain = scorer(binary(4), noise(4).keys)
    found = scorer.to(memory_format=torch.channels_last)(binary(4), noise(4).keys)
    torch.testing.assert_close(found.distortion, plain.distortion)
    torch.testing.assert_close(found.layer_rates, plain.layer_rates)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it while tracing, in vain here
def test_compiled_terms_and_gradients_equal_eager_ones(unchecked_shapes):
    """Through tracing and the joint graph; which kernels a backend then picks is its own matter."""
    scorer, found = NegativeELBO(build("1x1,4x1", shape=(1, 4, 4), lively=0.8), Bernoulli()), []
    for model in (scorer, torch.compile(scorer, backend="aot_eager")):
        terms = model(binary(4, shape=(1, 4, 4)), noise(4).keys)
        gradients = torch.autograd.grad((terms.distortion + terms.rate).sum(), list(scorer.parameters()))
        found.append([terms.distortion.detach(), terms.layer_rates.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_weights_come_back_from_their_state():
    first, second = build("1x1,4x2,8x1", lively=1.0), build("1x1,4x2,8x1", seed=3)
    assert not torch.equal(first.generate(noise(2)), second.generate(noise(2)))
    second.load_state_dict({name: weight.clone() for name, weight in first.state_dict().items()})
    assert torch.equal(first.generate(noise(2)), second.generate(noise(2)))
    assert torch.equal(
        first.infer(binary(2).float(), noise(2)).parameters, second.infer(binary(2).float(), noise(2)).parameters
    )


def test_output_starts_at_the_mean_of_each_plane():
    vae = build("1x1,8x1", shape=(3, 8, 8), planes=6)
    parameters = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0))
    vae.set_output_bias(parameters)
    torch.testing.assert_close(vae.output.bias.detach(), parameters.mean((1, 2)))


def kept_bytes(work) -> int:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.nbytes) or one, lambda one: one):
        work()
    return sum(kept)


@pytest.mark.parametrize("family", ["hierarchical", "conv"])
def test_recomputed_blocks_give_the_same_gradient_from_less_memory(family):
    """Bit for bit, in float32 on the CPU; under bfloat16, too, the second pass computes as the first."""
    settings = {"family": family, "layers": "1x1,4x2,8x3", "width": 16, "channels": [8, 8], "blocks": 3, "latent": 4}
    levels, keys = binary(4), noise(4).keys
    for precision in (torch.float32, torch.bfloat16):
        gradients, kept = [], []
        for recompute in (False, True):
            config = ModelConfig(**settings, recompute=recompute)
            scorer = NegativeELBO(build_model(config, shape=(1, 8, 8), output_planes=1, seed=0), Bernoulli())
            chance = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in scorer.parameters():  # heads that start at zero would hide what comes before them
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))

            def forward(scorer=scorer, precision=precision) -> Tensor:
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    return objective(scorer(levels, keys), beta=1.0, free_bits_nats=0.0).sum()

            kept.append(kept_bytes(forward))
            forward().backward()
            gradients.append([parameter.grad for parameter in scorer.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        assert kept[1] < 0.6 * kept[0]


def test_posteriors_see_the_state_and_the_map_as_one_convolution_would():
    vae = build("1x1,4x2,8x1", lively=1.0)
    state, seen, eps = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.randn(3, 2, 4, 4)
    rung = vae.down[1]
    mean, _ = rung.posterior(torch.cat((state, seen), 1)).chunk(2, dim=1)
    scales, features = rung.prior(state).split(rung.split, dim=1)
    layer, after = rung(state, eps, nn.functional.conv2d(nn.functional.gelu(seen), rung.from_map))
    torch.testing.assert_close(layer.posterior.mean, mean)
    torch.testing.assert_close(layer.prior.mean, scales[:, :2])
    torch.testing.assert_close(after, rung.change(state + features + rung.from_code(layer.z)))
