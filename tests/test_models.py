"""The families of models: published sizes, any picture's size, and weights that the seed alone decides."""

import copy
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from vaejob.config import LikelihoodConfig, ModelConfig
from vaejob.errors import ConfigError
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.likelihood.pixels import Bernoulli, make_pixels
from vaejob.model import VAE, build_model
from vaejob.model.gaussian import kl
from vaejob.model.noise import LATENT, Noise, image_noise
from vaejob.model.vae import Inference

MLP = ModelConfig(family="mlp")
TWO = ModelConfig(family="mlp", latent=100, upper_latent=50)
CONV = ModelConfig(family="conv", channels=[4, 6, 8], latent=5, blocks=2)
TIED = ModelConfig(family="tied")
TIED_CONV = ModelConfig(family="tied", tied_layers="conv", channels=[4, 6, 8], latent=5, activation="gelu")
FAMILIES = {"mlp": MLP, "two-layers": TWO, "conv": CONV, "tied": TIED, "tied-conv": TIED_CONV}
LADDER = ModelConfig(family="hierarchical", layers="2x1,4x1,8x1", width=8, latent_channels=2)

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
both_tied = pytest.mark.parametrize("config", [TIED, TIED_CONV], ids=["tied", "tied-conv"])


def build(config: ModelConfig, *, shape=(1, 28, 28), output_planes=1, seed=0) -> VAE:
    return build_model(config, shape=shape, output_planes=output_planes, seed=seed)


def noise(images: int) -> Noise:
    return image_noise(np.arange(images), seed=0, purpose="sample", device="cpu")


def test_mlp_has_the_published_number_of_weights():
    sizes = [(784, 200), (200, 200), (200, 100), (50, 200), (200, 200), (200, 784)]
    assert sum(p.numel() for p in build(MLP).parameters()) == sum(m * n + n for m, n in sizes)


def test_mlp_starts_as_published():
    """Glorot-uniform weights, zero biases; unlike the published code, layers of one size do not start alike."""
    layers = [module for module in build(MLP).modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        limit = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.99 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
        assert not layer.bias.any()
    squares = [layer.weight for layer in layers if layer.weight.shape == (200, 200)]
    assert len(squares) == 2
    assert not torch.equal(*squares)


def test_two_layers_have_the_published_number_of_weights():
    """784-200-200-(100)-100-100-(50), and back."""
    lower = [(784, 200), (200, 200), (200, 200), (100, 200), (200, 200), (200, 784)]
    upper = [(100, 100), (100, 100), (100, 100), (50, 100), (100, 100), (100, 200)]
    assert sum(p.numel() for p in build(TWO).parameters()) == sum(m * n + n for m, n in lower + upper)


def test_tied_weights_are_counted_once():
    weights, biases = 784 * 200 + 200 * 200 + 2 * 200 * 50, (200 + 200 + 2 * 50) + (200 + 200 + 784)
    tied, untied = (sum(p.numel() for p in build(config).parameters()) for config in (TIED, MLP))
    assert tied == weights + biases + 3  # a gain for each layer of the decoder
    assert tied / untied == pytest.approx(0.5, abs=0.03)
    convolutions = 9 * (4 * 1 + 6 * 4 + 8 * 6) + (4 + 6 + 8) + (1 + 4 + 6)
    dense = 2 * (392 * 5 + 5) + 392  # 8 channels of 7 x 7
    assert sum(p.numel() for p in build(TIED_CONV).parameters()) == convolutions + dense + 4


def test_mlp_code_is_mean_plus_exponential_times_noise():
    vae, inputs = build(MLP), torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    mean, log_std = vae.posterior(vae.encoder(inputs.flatten(1))).split(50, dim=1)
    (layer,), parameters = vae.infer(inputs, noise(3))
    torch.testing.assert_close(layer.z, mean + log_std.exp() * noise(3).normal(LATENT, (50,)))
    torch.testing.assert_close(parameters, vae.decode(layer.z))
    assert not layer.prior.mean.any()
    assert not layer.prior.log_std.any()


def test_mlp_decodes_the_mean_picture_at_zero():
    vae, parameters = build(MLP), torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0))
    vae.set_output_bias(parameters)
    assert torch.equal(vae.decode(torch.zeros(1, 50))[0], parameters)


def test_conv_starts_at_the_mean_of_each_channel():
    vae = build(CONV, shape=(3, 9, 9), output_planes=6)
    parameters = torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(0))
    vae.set_output_bias(parameters)
    torch.testing.assert_close(vae.output.bias.detach(), parameters.mean((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (9, 13), (17, 31), (8, 40)])
@pytest.mark.parametrize("channels", [1, 3])
@every_family
def test_pictures_of_any_size_come_back_in_that_size(config, channels, size):
    vae, shape = build(config, shape=(channels, *size), output_planes=2 * channels), (channels, *size)
    layers, parameters = vae.infer(torch.zeros(2, *shape), noise(2))
    assert parameters.shape == vae.generate(noise(2)).shape == (2, 2 * channels, *size)
    assert layers[-1].z.shape == (2, *vae.latent_shape)


@every_family
def test_every_weight_takes_part(config):
    vae = build(config, shape=(1, 9, 9), output_planes=2)
    for step in range(2):  # the last convolution of a residual block starts at zero, and lets the others in after it
        layers, parameters = vae.infer(torch.ones(2, 1, 9, 9), noise(2))
        ((1 + parameters).square().sum() + sum(layer.rate().sum() for layer in layers)).backward()
        without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
        assert step == 0 or not without, without
        torch.optim.SGD(vae.parameters(), lr=1e-3).step()
        vae.zero_grad()


@every_family
def test_a_rank_without_images_contributes_nothing(config):
    vae = build(config, shape=(3, 9, 13), output_planes=6)
    layers, parameters = vae.infer(torch.zeros(0, 3, 9, 13), noise(0))
    (parameters.sum() + sum(layer.rate().sum() for layer in layers)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in vae.parameters())


@every_family
def test_draws_are_laid_end_to_end(config):
    vae, inputs = build(config, shape=(1, 9, 9)), torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    encoding = vae.encode(inputs)
    _, together = vae.draw(encoding, noise(3).folds(range(4)), samples=4)
    apart = [vae.draw(encoding, noise(3).fold(k)).parameters for k in range(4)]
    torch.testing.assert_close(together, torch.cat(apart))


@every_family
def test_weights_depend_on_the_seed_alone(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, other = build(config, seed=7).state_dict(), build(config, seed=8).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build(config, seed=7).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "conv", "channels": [8] * 6}, r"model.channels has 6 levels.*8 x 40.*at most 4"),
        ({"family": "conv", "channels": [8, 0]}, r"model.channels is \[8, 0\]"),
        ({"family": "mlp", "hidden": [200, 0]}, r"model.hidden is \[200, 0\]"),
        (
            {"upper_latent": 5, "upper_hidden": [0]},
            r"model.upper_hidden is \[0\]; every layer must have at least 1 unit",
        ),
        ({"family": "tied", "hidden": [0]}, r"model.hidden is \[0\]"),
        ({"family": "tied", "tied_layers": "conv", "channels": [8] * 6}, r"model.channels has 6 levels.*at most 4"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        build(ModelConfig(**settings), shape=(1, 8, 40))
    assert "\n" not in str(refusal.value)


def negative_elbo(inference: Inference, levels: Tensor) -> Tensor:
    return -Bernoulli().log_prob(inference.parameters, levels) + sum(layer.rate() for layer in inference.layers)


def binary_images(images: int) -> Tensor:
    """Four prototypes of 8 x 8 pixels, of which one in twenty is flipped."""
    prototypes, flips = noise(4).uniform(1, (1, 8, 8)) < 0.5, noise(images).uniform(2, (1, 8, 8)) < 0.05
    return (prototypes.repeat(-(-images // 4), 1, 1, 1)[:images] ^ flips).to(torch.uint8)


class TestTwoLayersByQuadrature:
    """One dimension per code: log p(x) and the ELBO are sums over a grid of (z1, z2)."""

    levels = torch.tensor([[[[1, 0], [1, 1]]]], dtype=torch.uint8)
    draws = 40_000

    def model(self) -> VAE:
        config = ModelConfig(latent=1, hidden=[4], upper_latent=1, upper_hidden=[4])
        vae = build(config, shape=(1, 2, 2), seed=3).double()
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.mul_(2.0)
        return vae

    def inference(self, vae: VAE) -> Inference:
        return vae.draw(vae.encode(self.levels.double()), noise(1).folds(range(self.draws)), samples=self.draws)

    @torch.no_grad()
    def quadrature(self, vae: VAE) -> tuple[float, float]:
        """log p(x) and the ELBO, in nats."""
        line = torch.linspace(-12, 12, 1201, dtype=torch.float64)
        z1, z2 = line.repeat_interleave(1201)[:, None], line.repeat(1201)[:, None]
        normal = torch.distributions.Normal
        prior, q1, q2 = (
            vae.decode_upper(line[:, None]),
            vae.encode(self.levels.double()),
            vae.encode_upper(line[:, None]),
        )
        likelihood = Bernoulli().log_prob(vae.decode(line[:, None]), self.levels.repeat(1201, 1, 1, 1))
        p1 = normal(prior.mean.repeat(1201, 1), prior.log_std.exp().repeat(1201, 1)).log_prob(z1)
        p2 = normal(0.0, 1.0).log_prob(z2)
        posterior2 = normal(q2.mean.repeat_interleave(1201, 0), q2.log_std.exp().repeat_interleave(1201, 0))
        log_q = (normal(q1.mean, q1.log_std.exp()).log_prob(z1) + posterior2.log_prob(z2)).squeeze(1)
        log_joint = likelihood.repeat_interleave(1201) + (p1 + p2).squeeze(1)
        cell = float(line[1] - line[0]) ** 2
        assert log_q.exp().sum().item() * cell == pytest.approx(1, abs=1e-6)
        elbo = (log_q.exp() * (log_joint - log_q)).sum().item() * cell
        return log_joint.logsumexp(0).item() + math.log(cell), elbo

    @torch.no_grad()
    def test_rates_and_distortion_are_the_elbo(self):
        vae = self.model()
        found = -negative_elbo(self.inference(vae), self.levels.repeat(self.draws, 1, 1, 1))
        log_p, elbo = self.quadrature(vae)
        assert abs(found.mean() - elbo) < 4 * found.std() / math.sqrt(self.draws)
        assert elbo < log_p

    @torch.no_grad()
    def test_more_samples_come_closer_to_log_p_from_below(self):
        vae, copies = self.model(), 1000
        log_p, elbo = self.quadrature(vae)
        levels, draws = self.levels.repeat(copies, 1, 1, 1), noise(copies)
        bounds = importance_bound(vae.float(), Bernoulli(), levels, draws, samples=100).log_likelihood
        error = 4 * bounds.std().item() / math.sqrt(copies)
        assert elbo + error < bounds.mean() < log_p + error
        assert log_p - bounds.mean() < 0.2 * (log_p - elbo)

    @torch.no_grad()
    def test_the_closed_form_would_not_be_the_rate_of_the_lower_code(self):
        upper, lower = self.inference(self.model()).layers
        gap = kl(lower.posterior, lower.prior) - lower.rate()
        assert upper.analytic
        assert not lower.analytic
        assert gap.mean().abs() > 8 * gap.std() / math.sqrt(self.draws)


@pytest.mark.parametrize("config", [*FAMILIES.values(), LADDER], ids=[*FAMILIES, "hierarchical"])
@torch.no_grad()
def test_rates_are_the_mean_logarithm_of_the_ratio(config):
    vae, draws = build(config, shape=(1, 8, 8)), 4000
    inference = vae.draw(vae.encode(binary_images(1).float()), noise(1).folds(range(draws)), samples=draws)
    for layer in inference.layers:
        ratio = layer.posterior.log_prob(layer.z) - layer.prior.log_prob(layer.z)
        gap = layer.rate() - ratio
        assert abs(gap.mean()) <= 4 * gap.std() / math.sqrt(draws) + 1e-6


@torch.no_grad()
def test_two_layers_generate_through_the_learnt_prior():
    vae = build(TWO, shape=(1, 8, 8))
    prior = vae.decode_upper(noise(3).normal(LATENT, (50,)))
    assert torch.equal(vae.generate(noise(3)), vae.decode(prior.sample(noise(3).normal(LATENT + 1, (100,)))))


@both_tied
def test_decoder_uses_the_weights_of_the_encoder(config):
    vae = build(config, shape=(3, 9, 13), output_planes=6)
    z = torch.randn(2, config.latent, generator=torch.Generator().manual_seed(0))
    before = vae.decode(z)
    for layer in [*vae.layers, vae.mean]:
        with torch.no_grad():
            layer.weight.mul_(1.5)
            grown = vae.decode(z)
            layer.gain.div_(1.5)
            torch.testing.assert_close(vae.decode(z), before)
        assert not torch.allclose(grown, before)
        with torch.no_grad():
            layer.weight.div_(1.5)
            layer.gain.mul_(1.5)


@both_tied
def test_tied_layers_down_are_the_transpose_of_up(config):
    """<up(a), b> = <a, down(b)> without biases, for every layer."""
    vae, draws = build(config, shape=(3, 9, 14), output_planes=3).double(), torch.Generator().manual_seed(0)
    h = torch.rand(1, 3, 9, 14, dtype=torch.float64, generator=draws)
    h = h.flatten(1) if config.tied_layers == "dense" else h
    for layer in vae.layers:
        up = layer.up(h)
        b = torch.rand(up.shape, dtype=torch.float64, generator=draws)
        torch.testing.assert_close((up * b).sum(), (h * layer.down(b)).sum())
        h = up


def tied_loss(encoder: VAE, decoder: VAE, inputs: Tensor) -> Tensor:
    mean, log_std = encoder.encode(inputs)
    return decoder.decode(mean + log_std.exp()).square().sum()


@both_tied
def test_gradient_of_a_tied_weight_is_the_sum_of_both_paths(config):
    vae = build(config, shape=(1, 8, 9), output_planes=2).double()
    with torch.no_grad():
        vae.others.weight.fill_(0.5)
    up, down = copy.deepcopy(vae), copy.deepcopy(vae)
    inputs = torch.rand(2, 1, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tied_loss(vae, vae, inputs).backward()
    tied_loss(up, down, inputs).backward()
    for layer, above, below in zip(
        [*vae.layers, vae.mean], [*up.layers, up.mean], [*down.layers, down.mean], strict=True
    ):
        assert above.weight.grad.any()
        assert below.weight.grad.any()
        torch.testing.assert_close(layer.weight.grad, above.weight.grad + below.weight.grad)
        flat, step, ends = layer.weight.detach().view(-1), 1e-5, []
        for shift in (step, -2 * step):
            flat[3] += shift
            ends.append(tied_loss(vae, vae, inputs).item())
        flat[3] += step
        assert layer.weight.grad.view(-1)[3].item() == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7
        )


def test_tied_models_start_at_the_mean():
    """Of each pixel where the lowest layer is dense, else of each plane; planes that are not tied always of the plane."""
    for config in (TIED, TIED_CONV):
        vae, parameters = build(config, shape=(1, 9, 9), output_planes=2), noise(2).normal(0, (9, 9))
        vae.set_output_bias(parameters)
        found = vae.decode(torch.zeros(1, config.latent))[0]
        expected = parameters.mean((1, 2), keepdim=True).expand(2, 9, 9).clone()
        if config is TIED:
            expected[0] = parameters[0]
        torch.testing.assert_close(found, expected)


@both_tied
def test_tied_weights_survive_ddp_with_a_static_graph(config, tmp_path):
    scorer, levels = NegativeELBO(build(config, shape=(1, 8, 8)), Bernoulli()), binary_images(6)
    alone = copy.deepcopy(scorer)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(scorer, static_graph=True)
        for _ in range(3):
            for model in (alone, wrapped):
                model.zero_grad()
                terms = model(levels, noise(6).keys)
                (terms.distortion + terms.rate).sum().backward()
            for one, other in zip(alone.parameters(), scorer.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad)
    finally:
        torch.distributed.destroy_process_group()


@every_family
def test_weights_survive_a_file(config):
    vae, other = build(config, shape=(1, 8, 8), seed=1), build(config, shape=(1, 8, 8), seed=2)
    assert sum(t.numel() for t in vae.state_dict().values()) == sum(p.numel() for p in vae.parameters())
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(vae.state_dict())))
    inputs = binary_images(2).float()
    assert torch.equal(other.infer(inputs, noise(2)).parameters, vae.infer(inputs, noise(2)).parameters)


UNBOUNDED_UNITS = {
    "mlp-gelu": MLP.model_copy(update={"activation": "gelu"}),
    "two-layers-relu": TWO.model_copy(update={"activation": "relu"}),
    "conv": CONV,
    "tied": TIED,
    "tied-conv": TIED_CONV,
    "ladder": LADDER,
}


@pytest.mark.parametrize("config", UNBOUNDED_UNITS.values(), ids=UNBOUNDED_UNITS)
def test_no_weights_make_a_scale_overflow(config):
    vae = build(config, shape=(1, 8, 8))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(std=3.0)
    layers, _ = vae.infer(binary_images(4).float(), noise(4))
    for layer in layers:
        scales = torch.cat([gaussian.log_std.flatten() for gaussian in (layer.posterior, layer.prior)])
        assert scales.abs().max() <= 5


def test_tanh_units_have_the_scale_of_the_paper():
    vae = build(MLP, shape=(1, 8, 8))
    with torch.no_grad():
        vae.posterior.bias.fill_(7.0)
    assert vae.encode(binary_images(2).float()).log_std.min() > 5


@every_family
def test_gaussians_are_float32_under_autocast(config):
    vae = build(config, shape=(1, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers, _ = vae.infer(binary_images(2).float(), noise(2))
    for layer in layers:
        assert {t.dtype for t in (*layer.posterior, *layer.prior, layer.z, layer.rate())} == {torch.float32}


@pytest.mark.parametrize("pixels", ["bernoulli", "discretized-logistic"])
@pytest.mark.parametrize("config", [*FAMILIES.values(), LADDER], ids=[*FAMILIES, "hierarchical"])
def test_every_family_scores_every_kind_of_pixel(config, pixels):
    model = make_pixels(LikelihoodConfig(pixels=pixels, binarize="dynamic" if pixels == "bernoulli" else "none"))
    vae = build(config, shape=(3, 8, 8), output_planes=model.parameters(3))
    levels = binary_images(9).view(3, 3, 8, 8)
    layers, parameters = vae.infer(model.to_inputs(levels), noise(3))
    nats = -model.log_prob(parameters, levels) + sum(layer.rate() for layer in layers)
    nats.sum().backward()
    assert nats.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def train(vae: VAE, levels: Tensor, *, steps: int) -> list[float]:
    """The objective at each step, in nats per image."""
    optimizer, nats = torch.optim.Adam(vae.parameters(), lr=3e-3), []
    for step in range(steps):
        loss = negative_elbo(vae.infer(levels.float(), noise(len(levels)).fold(step)), levels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nats.append(loss.item())
    return nats


@every_family
def test_150_steps_learn_what_pixels_have_in_common(config):
    """Below the entropy of independent pixels by 5 nats: only a code that is used says which pixels go together."""
    vae, levels = build(config, shape=(1, 8, 8)), binary_images(64)
    frequency = levels.double().mean(0).clamp(0.01, 0.99)
    independent = torch.distributions.Bernoulli(frequency).entropy().sum().item()
    vae.set_output_bias(frequency.logit().float())
    nats = train(vae, levels, steps=150)
    assert np.mean(nats[-10:]) < min(nats[0], independent) - 5
