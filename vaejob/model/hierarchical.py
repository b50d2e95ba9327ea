"""A ladder of Gaussian codes drawn from the top down, after Child's VDVAE (arXiv 2011.10650), with bounded scales.

The encoder goes up once, from the picture to the smallest map, and keeps one map of each resolution. The decoder comes
down: each block asks its running state for a prior, state and encoder's map together for a posterior, draws a code from
one of them, and adds it to the state. So p(z) = prod_l p(z_l | z_<l) and q(z | x) = prod_l q(z_l | z_<l, x).

Shapes: B images, S draws per image, C H W channels and pixels, D channels inside, Z channels of a block's code, P pixel
parameters over all channels; h, w or _ pixels of the map at hand.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.memory import channels_last, when_needed
from vaejob.model.noise import LATENT, Noise
from vaejob.model.vae import VAE, Inference, Layer


class Activations(NamedTuple):
    """What the encoder made of each picture: one map per resolution, the smallest first."""

    maps: tuple[Float[Tensor, "B D _ _"], ...]

    def repeat(self, times: int) -> "Activations":
        """The whole batch, times over: the second copy follows the first."""
        if times == 1:
            return self
        return Activations(tuple(one.repeat(times, 1, 1, 1) for one in self.maps))


class Resolution(NamedTuple):
    """A stretch of the ladder whose maps have one size."""

    size: int  # pixels along either side
    blocks: int


class HierarchicalVAE(VAE):
    """Every weight takes part in every step, so that DDP may take the graph for static."""

    def __init__(self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int) -> None:
        super().__init__()
        ladder = _ladder(config.layers, shape=shape)
        width, channels = config.width, config.latent_channels
        self.recompute = config.recompute
        self.sizes = [size for size, _ in ladder]
        self.code_shapes = [(channels, size, size) for size, blocks in ladder for _ in range(blocks)]
        # VDVAE's encoders have about half as many blocks as their decoders.
        upward = [Resolution(size, (blocks + 1) // 2) for size, blocks in reversed(ladder)]
        up_gain, down_gain = sum(blocks for _, blocks in upward) ** -0.5, len(self.code_shapes) ** -0.5
        self.input = _conv(shape[0], width, 3)
        self.up = nn.ModuleList(
            nn.Sequential(*(Residual(width, size, gain=up_gain, recompute=config.recompute) for _ in range(blocks)))
            for size, blocks in upward
        )
        self.start = nn.Parameter(torch.zeros(1, width, self.sizes[0], self.sizes[0]))
        self.down: Sequence[Rung] = nn.ModuleList(  # type: ignore[assignment]
            Rung(width, channels, size, gain=down_gain) for _, _, size in self.code_shapes
        )
        self.output = Output(width, output_planes)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*(block for stretch in self.up for block in stretch.children()), *self.down, self.output]

    @property
    def streams(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return tuple((LATENT + layer, shape) for layer, shape in enumerate(self.code_shapes))

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Activations:  # type: ignore[override]
        """Unlike other families', not yet a Gaussian: a posterior below the top depends on the codes drawn above it."""
        h: Tensor = self.input(channels_last(inputs))
        maps = []
        for size, blocks in zip(reversed(self.sizes), self.up, strict=True):
            h = blocks(_shrink(h, size))
            maps.append(h)
        return Activations(tuple(reversed(maps)))

    def draw(self, encoding: Activations, noise: Noise, *, samples: int = 1) -> Inference:  # type: ignore[override]
        """Codes for each encoded picture; noise holds samples * B keys, the second draw of all images after the first."""
        return self._descend(dict(zip(self.sizes, encoding.repeat(samples).maps, strict=True)), noise)

    def generate(self, noise: Noise) -> Float[Tensor, "B P H W"]:
        return self._descend({}, noise).parameters

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        assert self.output.bias is not None
        self.output.bias.copy_(parameters.mean((1, 2)))

    def _descend(self, maps: dict[int, Tensor], noise: Noise) -> Inference:
        """With the encoder's map of each size, codes from the posteriors; without any, from the priors."""
        layers: list[Layer] = []
        eps = [noise.normal(stream, shape) for stream, shape in self.streams]
        seen = self._seen(maps) if maps else [None] * len(eps)
        state = self.start.expand(eps[0].shape[0], -1, -1, -1)
        for rung, (_, _, size), own, hint in zip(self.down, self.code_shapes, eps, seen, strict=True):
            layer, state = when_needed(rung, _grow(state, size), own, hint, recompute=self.recompute)
            layers.append(layer)
        return Inference(tuple(layers), self.output(state))

    def _seen(self, maps: dict[int, Tensor]) -> list[Tensor]:
        """What each rung's posterior makes of the encoder's map: one convolution for all rungs of a size."""
        hints: list[Tensor] = []
        for size in self.sizes:
            weights = [
                rung.from_map for rung, (_, _, own) in zip(self.down, self.code_shapes, strict=True) if own == size
            ]
            hints.extend(F.conv2d(F.gelu(maps[size]), torch.cat(weights)).chunk(len(weights), dim=1))
        return hints


class Rung(nn.Module):
    """One stochastic layer: a prior and a posterior from the state, and what the code drawn changes in it."""

    def __init__(self, width: int, channels: int, size: int, *, gain: float) -> None:
        super().__init__()
        self.split = [2 * channels, width]
        self.prior = Bottleneck(width, sum(self.split), width, size, gain=0.0)
        self.posterior = Bottleneck(2 * width, 2 * channels, width, size)
        self.from_code = _conv(channels, width, 1, gain=gain)
        self.change = Residual(width, size, gain=gain)

    @property
    def from_map(self) -> Float[Tensor, "M D 1 1"]:
        """The weights by which the posterior's first convolution takes in the encoder's map; the others are for the state."""
        return self.posterior.first.weight.chunk(2, dim=1)[1]

    def forward(
        self, state: Float[Tensor, "B D h w"], eps: Float[Tensor, "B Z h w"], seen: Float[Tensor, "B M h w"] | None
    ) -> tuple[Layer, Float[Tensor, "B D h w"]]:
        """seen: the encoder's map by from_map; None draws from the prior."""
        if seen is None:
            scales, features = self.prior(state).split(self.split, dim=1)
            posterior = prior = _bounded(scales)
        else:
            # Both begin with a 1x1 convolution of the same state, so it is one.
            own, others = self.prior.first, self.posterior.first
            assert own.bias is not None
            assert others.bias is not None
            weights, biases = (own.weight, others.weight.chunk(2, dim=1)[0]), (own.bias, others.bias)
            known, guess = F.conv2d(F.gelu(state), torch.cat(weights), torch.cat(biases)).chunk(2, dim=1)
            scales, features = torch.split(self.prior.after_first(known), self.split, dim=1)
            prior, posterior = _bounded(scales), _bounded(self.posterior.after_first(guess + seen))
        z = posterior.sample(eps)
        # As narrow as the network computes, though the ladder starts from a weight.
        state = state.to(features.dtype)
        return Layer(posterior, prior, z), self.change(state + features + self.from_code(z))


class Bottleneck(nn.Sequential):
    """1x1, 3x3, 3x3, 1x1 convolutions, the middle two a quarter as wide; a map of 1 or 2 pixels has 1x1 ones only."""

    def __init__(self, in_channels: int, out_channels: int, width: int, size: int, *, gain: float = 1.0) -> None:
        middle, kernel = max(width // 4, 1), 3 if size > 2 else 1
        super().__init__(
            nn.GELU(),
            _conv(in_channels, middle, 1),
            nn.GELU(),
            _conv(middle, middle, kernel),
            nn.GELU(),
            _conv(middle, middle, kernel),
            nn.GELU(),
            _conv(middle, out_channels, 1, gain=gain),
        )

    @property
    def first(self) -> nn.Conv2d:
        return self[1]  # type: ignore[return-value]

    def after_first(self, h: Float[Tensor, "B M h w"]) -> Float[Tensor, "B E h w"]:
        for module in list(self)[2:]:
            h = module(h)
        return h


class Residual(nn.Module):
    """gain 1 / sqrt(residual blocks in a row) keeps the variance of their sum from growing with the depth (VDVAE)."""

    def __init__(self, width: int, size: int, *, gain: float, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.change = Bottleneck(width, width, width, size, gain=gain)

    def forward(self, h: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        changed: Tensor = h + when_needed(self.change, h, recompute=self.recompute)
        return changed


class Output(nn.Conv2d):
    """Pixel parameters of the last state, by a 1x1 convolution."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__(width, planes, 1)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, state: Float[Tensor, "B D H W"]) -> Float[Tensor, "B P H W"]:
        h = F.gelu(state)
        if not is_compiling() or is_exporting():
            return super().forward(h)
        # The same as a product, which leaves each plane in one piece: a compiled likelihood goes through planes, and takes
        # three times as long where the parameters of a pixel lie side by side.
        assert self.bias is not None
        images = len(h)
        weights, biases = self.weight.flatten(1).expand(images, -1, -1), self.bias[:, None].expand(images, -1, -1)
        return torch.baddbmm(biases, weights, h.flatten(2)).view(images, -1, *h.shape[2:])


def _conv(in_channels: int, out_channels: int, kernel: int, *, gain: float = 1.0) -> nn.Conv2d:
    """torch's initial weights times gain, and no bias to start with: a prior of gain 0 starts as N(0, 1)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.mul_(gain)
        conv.bias.zero_()
    return conv


def _bounded(scales: Float[Tensor, "B ZZ h w"]) -> Gaussian:
    """A softplus with a floor, as in other ladders, would bound narrow scales alone; a wide posterior overflows as well.

    The mean is copied out from among the other channels: to whatever reads it, and to its gradient, holes cost more.
    """
    mean, log_std = scales.chunk(2, dim=1)
    return gaussian(channels_last(mean), log_std, bounded=True)


def _shrink(h: Float[Tensor, "B D H W"], size: int) -> Float[Tensor, "B D h w"]:
    """Means over windows of one size where those fit, the last one cut short (7 to 4): what _grow copies back to."""
    before = h.shape[-1]
    window = -(-before // size)
    if window == 1:
        return h
    if -(-before // window) == size:
        return F.avg_pool2d(h, window, ceil_mode=True)
    return F.adaptive_avg_pool2d(h, size)


def _grow(h: Float[Tensor, "B D h w"], size: int) -> Float[Tensor, "B D H W"]:
    grown = h if h.shape[-1] == size else F.interpolate(h, size=(size, size), mode="nearest")
    return channels_last(grown)


def _ladder(layers: str, *, shape: tuple[int, int, int]) -> list[Resolution]:
    """The resolutions that model.layers names, from the top down. Raises ConfigError where they are none of a ladder."""
    _, height, width = shape
    if height != width:
        raise ConfigError(f"model.family is hierarchical and pictures are {height} x {width}; they must be square")
    found = [re.fullmatch(r"\s*([0-9]+)x([0-9]+)\s*", part) for part in layers.split(",")]
    if not all(found):
        raise ConfigError(f"model.layers is {layers!r}; it must read size x count from the top down, as in 1x1,4x2,8x4")
    ladder = [Resolution(int(match[1]), int(match[2])) for match in found if match]
    if min(min(one) for one in ladder) < 1:
        raise ConfigError(f"model.layers is {layers!r}; every size and every count must be at least 1")
    for above, below in itertools.pairwise(ladder):
        if above.size >= below.size:
            raise ConfigError(f"model.layers is {layers!r}; sizes must grow, but {below.size} follows {above.size}")
    if ladder[-1].size != height:
        raise ConfigError(f"model.layers is {layers!r}; its last size must be that of the pictures, {height}")
    return ladder
