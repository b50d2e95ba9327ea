"""Residual convolutions around one vector of codes; each level halves the picture, rounding up.

Shapes: B images, C H W channels and pixels, D channels inside.
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.memory import channels_last, when_needed
from vaejob.model.vae import VAE


class ConvVAE(VAE):
    """The decoder mirrors the encoder and crops where halving had rounded up, so any size comes back exactly."""

    def __init__(self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int) -> None:
        super().__init__()
        in_channels, height, width = shape
        channels, sizes = config.channels, level_sizes(config.channels, height, width)
        self.latent_shape = (config.latent,)
        self.deepest_shape = (channels[-1], *sizes[-1])
        flat = math.prod(self.deepest_shape)
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, padding=1),
            *_stage(channels[0], config),
            *itertools.chain.from_iterable(
                (nn.Conv2d(m, n, 3, stride=2, padding=1), *_stage(n, config)) for m, n in itertools.pairwise(channels)
            ),
            nn.SiLU(),
        )
        self.posterior = nn.Linear(flat, 2 * config.latent)
        self.from_latent = nn.Linear(config.latent, flat)
        upward = itertools.pairwise(channels[::-1])
        self.decoder = nn.Sequential(
            *_stage(channels[-1], config),
            *itertools.chain.from_iterable(
                (Double(m, n, size), *_stage(n, config)) for (m, n), size in zip(upward, sizes[-2::-1], strict=True)
            ),
            nn.SiLU(),
        )
        self.output = nn.Conv2d(channels[0], output_planes, 3, padding=1)

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Gaussian:
        mean, log_std = self.posterior(self.encoder(channels_last(inputs)).flatten(1)).chunk(2, dim=1)
        return gaussian(mean, log_std, bounded=True)

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B P H W"]:
        deepest = channels_last(self.from_latent(z).view(z.shape[0], *self.deepest_shape))
        parameters: Tensor = self.output(self.decoder(deepest))
        return parameters

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        assert self.output.bias is not None
        self.output.bias.copy_(parameters.mean((1, 2)))


class Residual(nn.Module):
    """Starts as the identity: the last convolution is zero."""

    def __init__(self, channels: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.change = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), last)

    def forward(self, h: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        changed: Tensor = h + when_needed(self.change, h, recompute=self.recompute)
        return changed


class Double(nn.Module):
    """Twice the size, cropped to the one that was halved."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, h: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E H W"]:
        height, width = self.size
        doubled: Tensor = self.up(h)
        return doubled[:, :, :height, :width]


def _stage(channels: int, config: ModelConfig) -> list[nn.Module]:
    return [Residual(channels, recompute=config.recompute) for _ in range(config.blocks)]


def level_sizes(channels: list[int], height: int, width: int) -> list[tuple[int, int]]:
    """The picture's size at each level, in pixels; each is half the one before, rounded up."""
    if min(channels) < 1:
        raise ConfigError(f"model.channels is {channels}; every level must have at least 1 channel")
    sizes = [(height, width)]
    while len(sizes) < len(channels):
        above = sizes[-1]
        if min(above) < 2:
            raise ConfigError(
                f"model.channels has {len(channels)} levels; "
                f"a picture of {height} x {width} can be halved for at most {len(sizes)}"
            )
        sizes.append(((above[0] + 1) // 2, (above[1] + 1) // 2))
    return sizes
