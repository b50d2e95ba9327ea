"""A decoder that uses the encoder's weights, transposed: each weight exists once and learns from both of its uses.

Biases, a gain for each layer of the decoder, the scale of the posterior and all planes beyond one per channel are free.

Shapes: B images, C H W channels and pixels, D E channels inside, P pixel parameters over all channels.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vaejob.config import ModelConfig
from vaejob.model.conv import level_sizes
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.mlp import ACTIVATIONS, check_units, glorot
from vaejob.model.vae import VAE


class TiedVAE(VAE):
    """The first C planes are the tied decoder's; a 1x1 convolution of them gives the others, such as scales."""

    def __init__(self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int) -> None:
        super().__init__()
        assert output_planes >= shape[0], (output_planes, shape)
        self.shape = shape
        self.latent_shape = (config.latent,)
        self.activation = ACTIVATIONS[config.activation]()
        self.layers: Sequence[TiedLinear | TiedConv]
        if config.tied_layers == "dense":
            check_units("hidden", config.hidden)
            self.bottom_shape: tuple[int, ...] = (math.prod(shape),)
            self.top_shape: tuple[int, ...] = (config.hidden[-1],)
            sizes = itertools.pairwise([math.prod(shape), *config.hidden])
            self.layers = nn.ModuleList(TiedLinear(m, n) for m, n in sizes)  # type: ignore[assignment]
        else:
            levels = level_sizes(config.channels, *shape[1:])
            self.bottom_shape = shape
            self.top_shape = (config.channels[-1], *levels[-1])
            pairs = itertools.pairwise([shape[0], *config.channels])
            pictures = [levels[0], *levels]  # the first convolution keeps the size
            self.layers = nn.ModuleList(  # type: ignore[assignment]
                TiedConv(m, n, below=below, stride=1 if level == 0 else 2)
                for level, ((m, n), below) in enumerate(zip(pairs, pictures, strict=False))
            )
        self.mean = TiedLinear(math.prod(self.top_shape), config.latent)
        self.log_std = nn.Linear(math.prod(self.top_shape), config.latent)
        others = output_planes - shape[0]
        self.others = nn.Conv2d(shape[0], others, 1) if others else None
        self.apply(glorot)
        if self.others is not None:
            nn.init.zeros_(self.others.weight)

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Gaussian:
        h = inputs.reshape(inputs.shape[0], *self.bottom_shape)
        for layer in self.layers:
            h = self.activation(layer.up(h))
        h = h.flatten(1)
        return gaussian(self.mean.up(h), self.log_std(h), bounded=True)

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B P H W"]:
        h = self.mean.down(z).view(z.shape[0], *self.top_shape)
        for layer in reversed(self.layers):
            h = layer.down(self.activation(h))
        planes = h.view(z.shape[0], *self.shape)
        return planes if self.others is None else torch.cat((planes, self.others(planes)), dim=1)

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        """One value per pixel where the lowest layer is dense, else one per plane."""
        channels, lowest = self.shape[0], self.layers[0]
        tied = parameters[:channels]
        lowest.down_bias.copy_(tied.flatten() if isinstance(lowest, TiedLinear) else tied.mean((1, 2)))
        if self.others is not None:
            assert self.others.bias is not None
            self.others.bias.copy_(parameters[channels:].mean((1, 2)))


class TiedLinear(nn.Linear):
    """W up and its transpose down, with a bias for either way and a gain for the way down."""

    def __init__(self, below: int, above: int) -> None:
        super().__init__(below, above)
        self.gain = nn.Parameter(torch.ones(()))
        self.down_bias = nn.Parameter(torch.zeros(below))

    def up(self, h: Float[Tensor, "B below"]) -> Float[Tensor, "B above"]:
        raised: Tensor = self(h)
        return raised

    def down(self, h: Float[Tensor, "B above"]) -> Float[Tensor, "B below"]:
        return self.gain * F.linear(h, self.weight.t()) + self.down_bias


class TiedConv(nn.Conv2d):
    """A 3x3 convolution up and its transpose down, back to the size that it came from."""

    def __init__(self, in_channels: int, out_channels: int, *, below: tuple[int, int], stride: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)
        # A transposed convolution ends at stride * (h - 1) + 1 pixels; halving an even size had dropped one more.
        self.added = tuple((size - 1) % stride for size in below)
        self.gain = nn.Parameter(torch.ones(()))
        self.down_bias = nn.Parameter(torch.zeros(in_channels))

    def up(self, h: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E h w"]:
        raised: Tensor = self(h)
        return raised

    def down(self, h: Float[Tensor, "B E h w"]) -> Float[Tensor, "B D H W"]:
        lowered = F.conv_transpose2d(h, self.weight, stride=self.stride, padding=1, output_padding=self.added)
        return self.gain * lowered + self.down_bias[:, None, None]
