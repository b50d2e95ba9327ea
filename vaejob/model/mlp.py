"""Dense encoder and decoder after Burda, Grosse and Salakhutdinov (arXiv 1509.00519), with one stochastic layer."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.vae import VAE


class Tanh(nn.Tanh):
    """Within 2e-7 of tanh where it is compiled for a CPU: a compiler's own loops take twice as long for tanh."""

    def forward(self, x: Tensor) -> Tensor:
        if is_compiling() and not is_exporting() and x.device.type == "cpu":
            return 2 * torch.sigmoid(2 * x) - 1
        return torch.tanh(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class DenseVAE(VAE):
    """Encoder C*H*W-hidden-latent with the log of the standard deviation; the decoder runs the other way."""

    def __init__(self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int) -> None:
        super().__init__()
        check_units("hidden", config.hidden)
        self.latent_shape = (config.latent,)
        self.output_shape = (output_planes, *shape[1:])
        activation = ACTIVATIONS[config.activation]
        self.bounded = config.activation != "tanh"  # the paper's exp(linear) of units between -1 and 1
        self.encoder = dense([math.prod(shape), *config.hidden], activation)
        self.posterior = nn.Linear(config.hidden[-1], 2 * config.latent)
        self.decoder = dense([config.latent, *config.hidden[::-1]], activation)
        self.output = nn.Linear(config.hidden[0], math.prod(self.output_shape))
        self.apply(glorot)

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Gaussian:
        mean, log_std = self.posterior(self.encoder(inputs.flatten(1))).chunk(2, dim=1)
        return gaussian(mean, log_std, bounded=self.bounded)

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B P H W"]:
        parameters: Tensor = self.output(self.decoder(z))
        return parameters.view(z.shape[0], *self.output_shape)

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        self.output.bias.copy_(parameters.flatten())


def check_units(name: str, units: list[int]) -> None:
    if min(units) < 1:
        raise ConfigError(f"model.{name} is {units}; every layer must have at least 1 unit")


def dense(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*itertools.chain.from_iterable((nn.Linear(m, n), activation()) for m, n in pairs))


def glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
