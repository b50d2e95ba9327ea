"""The mass of a logistic in a bin, alone or mixed, with its derivatives: both in one pass, so that backward needs no other.

What a graph keeps is the gradient alone, as large as the parameters. It knows first derivatives only.

Shapes: B images, C channels, H W pixels, N pixels of a piece, M components, P planes of parameters.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaejob.likelihood.levels import MAX_LOG_SCALE, MIN_LOG_SCALE

FAR = 1e35
"""Where an end bin ends: beyond any mean, and finite in float32 when divided by the narrowest scale."""

PIECE_VALUES, GPU_PIECE_VALUES = 1 << 18, 1 << 27
"""Parameters taken at once: in a CPU's cache, and enough that what an operation costs to begin does not count."""


class Bins(NamedTuple):
    """Where each level is in [-1, 1], and the stretch that it stands for."""

    x: Tensor
    low: Tensor
    high: Tensor
    half: Tensor  # of its width

    @classmethod
    def of(cls, levels: Tensor, *, count: int, dtype: torch.dtype) -> "Bins":
        # The bin of level j is [2j - n, 2j - n + 2] / (n - 1). Neighbours round their common edge alike, so that
        # what one gains by rounding the other loses.
        edge, top, first, last = 2 * levels.to(dtype) - count, count - 1, levels == 0, levels == count - 1
        return cls(
            (edge + 1) / top,
            (edge / top).masked_fill_(first, -FAR),
            ((edge + 2) / top).masked_fill_(last, FAR),
            torch.full_like(edge, 1 / top).masked_fill_(first | last, FAR),
        )


class Mass(NamedTuple):
    """Nats of each bin, and by how much they grow with either parameter."""

    nats: Tensor
    by_mean: Tensor | None = None
    by_log_scale: Tensor | None = None


def logistic_mass(mean: Tensor, log_scale: Tensor, bins: Bins, *, slopes: bool) -> Mass:
    """Arguments broadcast, to the shape of bins and mean together."""
    kept = log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    inverse_scale = kept.neg().exp_()
    # log(sigma(b) - sigma(a)) = log sigma(b) + log sigma(-a) + log(1 - e^-2h), 2h = b - a, where
    # log sigma(-a) = -max(a, 0) - log(1 + e^-|a|), a and -b are never positive at once, and
    # 1 - e^-2h = t / (1/2 + t/2), t = tanh h: all that is left is one logarithm.
    below = (bins.low - mean).mul_(inverse_scale)  # a
    above = (mean - bins.high).mul_(inverse_scale)  # -b
    half = bins.half * inverse_scale
    t = half.tanh()
    rest = (t * 0.5).add_(0.5)
    for side in (below, above):
        rest.mul_(side.abs().neg_().exp_().add_(1))
    nats = (t / rest).log_().sub_(torch.maximum(below, above).clamp_(min=0))
    if not slopes:
        return Mass(nats)
    # h falls by as much as log s grows: -h d/dh log(1 - e^-2h) = h - h / t, two numbers that cancel in an end bin.
    by_log_scale = half.sub_(half / t)
    left, right = below.sigmoid(), above.sigmoid()
    by_log_scale.addcmul_(below, left).addcmul_(above, right).mul_(kept.eq_(log_scale))
    return Mass(nats, left.sub_(right).mul_(inverse_scale), by_log_scale)


class Piece(NamedTuple):
    """What a model makes of some pixels: nats of each, and their gradient."""

    nats: Float[Tensor, "B N"]
    gradient: Float[Tensor, "B P N"] | None


def single(
    parameters: Float[Tensor, "B P N"],
    bins: Bins,
    *,
    slopes: bool,
) -> Piece:
    """One logistic for each channel: its mean, then its scale."""
    mean, log_scale = parameters.chunk(2, dim=1)
    mass = logistic_mass(mean, log_scale, bins, slopes=slopes)
    return Piece(mass.nats.sum(1), torch.cat(mass[1:], 1) if slopes else None)  # type: ignore[arg-type]


def mixture(
    parameters: Float[Tensor, "B P N"],
    bins: Bins,
    *,
    components: int,
    slopes: bool,
) -> Piece:
    """Weights, means, log-scales; for RGB also what couples green to red, blue to red and blue to green."""
    bins = Bins(*(each.unsqueeze(1) for each in bins))
    images, _, channels, pixels = bins.x.shape
    n, sizes = components * channels, (images, components, channels, pixels)
    rest = parameters.shape[1] - components - 2 * n
    weights, mean, log_scale, coupling = torch.split(parameters, [components, n, n, rest], dim=1)
    if channels == 3:
        red, green, _ = bins.x.unbind(2)
        coupling = coupling.view(sizes).tanh()
        a, b, c = coupling.unbind(2)
        mean = mean.view(sizes).clone()
        mean[:, :, 1].addcmul_(a, red)
        mean[:, :, 2].addcmul_(b, red).addcmul_(c, green)
    mass = logistic_mass(mean.view(sizes), log_scale.view(sizes), bins, slopes=slopes)
    joint = mass.nats.sum(2).add_(log_weights := weights.log_softmax(1))
    most = joint.amax(1, keepdim=True)
    share = joint.sub_(most).exp_()
    total = share.sum(1, keepdim=True)
    nats = total.log().add_(most).squeeze(1)
    if not slopes:
        return Piece(nats, None)
    assert mass.by_mean is not None
    assert mass.by_log_scale is not None
    share.div_(total)
    by_mean, by_log_scale = (each.mul_(share.unsqueeze(2)) for each in (mass.by_mean, mass.by_log_scale))
    parts = [share - log_weights.exp_(), by_mean.view(images, n, pixels), by_log_scale.view(images, n, pixels)]
    if channels == 3:
        _, by_green, by_blue = by_mean.unbind(2)
        by_coupling = torch.stack((by_green * red, by_blue * red, by_blue * green), 2)
        parts.append(torch.ops.aten.tanh_backward(by_coupling, coupling).view(images, n, pixels))
    return Piece(nats, torch.cat(parts, 1))


Model = Callable[..., Piece]
"""(parameters, bins, slopes=...) of the pixels of a piece."""


def summed(
    parameters: Float[Tensor, "B P H W"], levels: UInt8[Tensor, "B C H W"], model: Model, *, count: int
) -> Float[Tensor, " B"]:
    """Nats of each image; the same number whether a gradient is wanted or not."""
    if parameters.requires_grad and torch.is_grad_enabled():
        nats: Tensor = _Summed.apply(parameters, levels, model, count)  # type: ignore[no-untyped-call]
        return nats
    return _in_pieces(parameters, levels, model, count=count, slopes=False)[0]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, levels: Tensor, model: Model, count: int) -> Tensor:
        nats, gradient = _in_pieces(parameters, levels, model, count=count, slopes=True)
        ctx.save_for_backward(gradient)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Rounded last: a weight rounded to bfloat16 would tilt the whole likelihood against the rate.
        return (gradient * upstream.view(-1, 1, 1, 1)).to(gradient.dtype), None, None, None


def _in_pieces(
    parameters: Tensor, levels: Tensor, model: Model, *, count: int, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Nats of each image, and their gradient in the type and the layout of the parameters."""
    wide = torch.promote_types(parameters.dtype, torch.float32)
    planes, bins = parameters.flatten(2), Bins.of(levels.flatten(2), count=count, dtype=wide)
    if torch.compiler.is_compiling():  # a compiler makes loops of its own
        nats, gradient = model(planes.to(wide), bins, slopes=slopes)
        return nats.sum(1), None if gradient is None else gradient.to(parameters.dtype).view_as(parameters)
    nats = torch.empty(len(planes), planes.shape[2], dtype=wide, device=planes.device)
    gradient = torch.empty_like(parameters) if slopes else None
    for images, pixels in _pieces(*planes.shape, on_cpu=planes.device.type == "cpu"):
        own = planes[images, :, pixels].to(wide).contiguous()
        piece = model(own, Bins(*(each[images, :, pixels] for each in bins)), slopes=slopes)
        nats[images, pixels] = piece.nats
        if gradient is not None and piece.gradient is not None:
            gradient.flatten(2)[images, :, pixels] = piece.gradient
    return nats.sum(1), gradient


def _pieces(images: int, planes: int, pixels: int, *, on_cpu: bool) -> Iterator[tuple[slice, slice]]:
    """Whole images, as many as fit; or stretches of one."""
    most = max(1, (PIECE_VALUES if on_cpu else GPU_PIECE_VALUES) // planes)
    rows, columns = max(1, most // max(pixels, 1)), max(1, min(most, pixels))
    for i in range(0, images, rows):
        for j in range(0, pixels, columns):
            yield slice(i, i + rows), slice(j, j + columns)
