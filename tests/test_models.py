"""The families of models: published sizes, any picture's size, and weights that the seed alone decides."""

import numpy as np
import pytest
import torch
from torch import nn

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.model import VAE, build_model
from vaejob.model.noise import LATENT, Noise, image_noise

MLP = ModelConfig(family="mlp")
CONV = ModelConfig(family="conv", channels=[4, 6, 8], latent=5, blocks=2)


def build(config: ModelConfig, *, shape=(1, 28, 28), parameters_per_channel=1, seed=0) -> VAE:
    return build_model(config, shape=shape, parameters_per_channel=parameters_per_channel, seed=seed)


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
    vae = build(CONV, shape=(3, 9, 9), parameters_per_channel=2)
    parameters = torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(0))
    vae.set_output_bias(parameters)
    torch.testing.assert_close(vae.output.bias.detach(), parameters.mean((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (9, 13), (17, 31), (8, 40)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
def test_pictures_of_any_size_come_back_in_that_size(config, channels, size):
    vae, shape = build(config, shape=(channels, *size), parameters_per_channel=2), (channels, *size)
    (layer,), parameters = vae.infer(torch.zeros(2, *shape), noise(2))
    assert parameters.shape == vae.generate(noise(2)).shape == (2, 2 * channels, *size)
    assert layer.z.shape == (2, *vae.latent_shape)


@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
def test_every_weight_takes_part(config):
    vae = build(config, shape=(1, 9, 9))
    for step in range(2):  # the last convolution of a residual block starts at zero, and lets the others in after it
        (layer,), parameters = vae.infer(torch.ones(2, 1, 9, 9), noise(2))
        (parameters.square().sum() + layer.posterior.log_std.sum()).backward()
        without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
        assert step == 0 or not without, without
        torch.optim.SGD(vae.parameters(), lr=1e-3).step()
        vae.zero_grad()


@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
def test_a_rank_without_images_contributes_nothing(config):
    vae = build(config, shape=(3, 9, 13))
    (layer,), parameters = vae.infer(torch.zeros(0, 3, 9, 13), noise(0))
    (parameters.sum() + layer.posterior.log_std.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in vae.parameters())


@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
def test_draws_are_laid_end_to_end(config):
    vae, inputs = build(config, shape=(1, 9, 9)), torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    encoding = vae.encode(inputs)
    _, together = vae.draw(encoding, noise(3).folds(range(4)), samples=4)
    apart = [vae.draw(encoding, noise(3).fold(k)).parameters for k in range(4)]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
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
    ],
)
def test_impossible_sizes_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        build(ModelConfig(**settings), shape=(1, 8, 40))
    assert "\n" not in str(refusal.value)
