"""Bounds on log p(x), image by image, in nats.

Shapes: B images, L stochastic layers, K samples (codes drawn per image), C H W channels and pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from vaejob.config import ObjectiveConfig
from vaejob.likelihood.pixels import ObservationModel
from vaejob.model.decoder_only import DecoderOnlyVAE
from vaejob.model.gaussian import Gaussian
from vaejob.model.noise import LATENT, Noise
from vaejob.model.vae import VAE, Inference, Layer

ONE_CODE = ObjectiveConfig()
"""The ELBO with one code per image, which is what held-out images are scored by."""

CHUNK_VALUES, COMPILED_CHUNK_VALUES, GPU_CHUNK_VALUES = 1 << 19, 1 << 21, 1 << 24
"""Draws x images x pixels x channels that importance_bound scores at once, of one draw at least.

4 bytes for each of a value's parameters, hidden layers on top. A CPU is fastest where they stay in its cache: on one core
9 us per draw of the dense MNIST model, 12 us with 4 times as many, 20 us with 50 times. Compiled, less is kept between.
"""
WEIGHT_BYTES = 1 << 26
"""Log-weights (float64) that importance_bound holds; beyond it, images are scored in several groups."""


class BoundTerms(NamedTuple):
    """The negative bound of each image, and the two halves of its negative ELBO, averaged over the codes drawn."""

    distortion: Float[Tensor, " B"]  # -log p(x | z)
    layer_rates: Float[
        Tensor, "B L"
    ]  # of each layer, given the sampled others: KL(q || p), or log q / p of the code drawn
    negative_bound: Float[Tensor, " B"] | None = None  # None: the negative ELBO, so the sum of the halves

    @property
    def rate(self) -> Float[Tensor, " B"]:
        return self.layer_rates.sum(1)

    def detach(self) -> "BoundTerms":
        return BoundTerms(*(None if term is None else term.detach() for term in self))  # type: ignore[arg-type]


class NegativeELBO(nn.Module):
    """What DistributedDataParallel wraps: one forward, through encoder, decoder and likelihood."""

    def __init__(self, vae: VAE, pixels: ObservationModel) -> None:
        super().__init__()
        self.vae = vae
        self.pixels = pixels

    def forward(
        self,
        levels: Tensor,
        noise_keys: Int64[Tensor, " B"],
        config: ObjectiveConfig = ONE_CODE,
        ids: Int64[Tensor, " B"] | None = None,
        drawn: Mapping[int, Tensor] | None = None,
    ) -> BoundTerms:
        """The negative ELBO, or the bound that config names, with its number of codes per image.

        drawn: what `draws` gave of the same keys and config; without it the numbers are drawn here.
        With ids: -log p(x | z) of the code z that belongs to each image, by its sample id, which is no bound on log p(x).
        """
        if ids is not None:
            assert isinstance(self.vae, DecoderOnlyVAE), type(self.vae)
            codes = drawn[LATENT] if drawn else self.vae.own_codes(ids)
            distortion = -self.pixels.log_prob(self.vae.decode(codes), levels)
            return BoundTerms(distortion, torch.zeros_like(distortion)[:, None])
        inputs, samples = self.pixels.to_inputs(levels), config.samples
        noise = _noise_of_codes(noise_keys, config) if drawn is None else Noise(noise_keys, drawn)
        return self.terms(self.vae.draw(self.vae.encode(inputs), noise, samples=samples), levels, config)

    def terms(self, inference: Inference, levels: Tensor, config: ObjectiveConfig) -> BoundTerms:
        """Of codes drawn for each image, config.samples of them, and what they decode to."""
        samples = config.samples
        if config.bound == "elbo":
            distortion = -self.pixels.log_prob(inference.parameters, _repeat(levels, samples))
            return BoundTerms(_mean_over_samples(distortion, samples), _rates(inference.layers, samples))
        twice = config.gradient == "dreg"
        return _importance_weighted(inference, self.pixels, levels, samples=samples, twice=twice)


def draws(
    vae: VAE, keys: Int64[Tensor, " B"], config: ObjectiveConfig, ids: Int64[Tensor, " B"] | None = None
) -> Mapping[int, Float[Tensor, "KB ..."]]:
    """The numbers that the codes of a batch are drawn from, by stream: a compiled graph must not make them itself.

    With ids: the codes themselves, if they are drawn and not learnt.
    """
    if ids is not None:
        assert isinstance(vae, DecoderOnlyVAE), type(vae)
        return {LATENT: vae.drawn_codes(ids)} if vae.table is None else {}
    drawn = _noise_of_codes(keys, config).draw(vae.streams).drawn
    assert drawn is not None
    return drawn


def _noise_of_codes(keys: Int64[Tensor, " B"], config: ObjectiveConfig) -> Noise:
    noise = Noise(keys)
    return noise if config.bound == "elbo" and config.samples == 1 else noise.folds(range(config.samples))


def objective(terms: BoundTerms, *, beta: float | Float[Tensor, ""], free_bits_nats: float) -> Float[Tensor, " B"]:
    """What is minimised for each image; it is the negative ELBO only where beta is 1 and no bits are free.

    A bound that is no sum of two halves is minimised as it is.
    """
    if terms.negative_bound is not None:
        return terms.negative_bound
    # A rate that was sampled may be negative: without free bits nothing is clipped.
    rates = terms.layer_rates.clamp(min=free_bits_nats) if free_bits_nats > 0 else terms.layer_rates
    return terms.distortion + beta * rates.sum(1)


class ImportanceBound(NamedTuple):
    """The K-sample bound of each image, and how many samples its weights are worth."""

    log_likelihood: Float64[Tensor, " B"]
    effective_samples: Float64[Tensor, " B"]  # (sum w)^2 / sum w^2, between 1 and K


def weights_of(inference: Inference, pixels: ObservationModel, levels: Tensor) -> Float[Tensor, " KB"]:
    """log p(x, z) - log q(z | x) of codes that are drawn and decoded."""
    return _log_weights(pixels.log_prob(inference.parameters, levels), inference.layers)


def log_weights(
    vae: VAE,
    pixels: ObservationModel,
    levels: Tensor,
    encoding: Any,
    noise: Noise,
    samples: int,
    *,
    weigh: Callable[..., Tensor] = weights_of,
) -> Float[Tensor, " KB"]:
    """log p(x, z) - log q(z | x) of codes drawn for encoded images: K = samples for each, the second draw of all after the first.

    levels and noise hold K rows for each image, in that order. weigh: weights_of, or what torch.compile makes of it.
    """
    return weigh(vae.draw(encoding, noise, samples=samples), pixels, levels)


@torch.no_grad()
def importance_bound(
    vae: VAE,
    pixels: ObservationModel,
    levels: Tensor,
    noise: Noise,
    *,
    samples: int,
    chunk: int | None = None,
    weigh: Callable[..., Tensor] = log_weights,
) -> ImportanceBound:
    """log 1/K sum_k p(x, z_k) / q(z_k | x) by Burda et al., K = samples.

    Neither draws nor sums depend on the chunk (draws decoded at once, by default as many as CHUNK_VALUES allow): a log-weight
    is the same but for the last bits of the network's matrix products, whose rounding may change with the batch.

    weigh: log_weights, or what is compiled of it.
    """
    assert samples >= 1, samples
    most = max(1, WEIGHT_BYTES // (8 * samples))
    if len(levels) > most:
        parts = [
            importance_bound(vae, pixels, some, Noise(keys), samples=samples, chunk=chunk, weigh=weigh)
            for some, keys in zip(torch.split(levels, most), torch.split(noise.keys, most), strict=True)
        ]
        return ImportanceBound(*(torch.cat(each) for each in zip(*parts, strict=True)))
    if chunk is None:
        on_cpu = CHUNK_VALUES if weigh is log_weights else COMPILED_CHUNK_VALUES
        most_values = on_cpu if levels.device.type == "cpu" else GPU_CHUNK_VALUES
        chunk = max(1, most_values // max(levels.numel(), 1))
    encoding = vae.encode(pixels.to_inputs(levels))
    log_w = torch.empty(samples, len(levels), dtype=torch.float64, device=levels.device)
    repeated = _repeat(levels, min(chunk, samples))
    for start in range(0, samples, chunk):
        several = range(start, min(start + chunk, samples))
        rows = repeated[: len(several) * len(levels)]
        # Drawn beforehand: a compiled graph must not make them itself.
        codes = noise.folds(several).draw(vae.streams)
        weights = weigh(vae, pixels, rows, encoding, codes, len(several))
        log_w[start : several.stop] = weights.view(len(several), len(levels))
    return combine_weights(log_w)


def combine_weights(log_w: Float64[Tensor, "K B"]) -> ImportanceBound:
    """The bound of K weights per image, exact in their order: all are multiples of one unit, added up as integers."""
    samples = len(log_w)
    # K weights of at most 1, in multiples of 1 / unit, stay below 2^62.
    largest, unit = log_w.amax(0), 2.0 ** (62 - samples.bit_length())
    w = (log_w - largest).exp_()
    total, squares = (((each * unit).round_().long().sum(0).double() / unit) for each in (w, w.square()))
    return ImportanceBound(largest + total.log() - math.log(samples), total.square() / squares)


def _importance_weighted(
    inference: Inference, pixels: ObservationModel, levels: Tensor, *, samples: int, twice: bool
) -> BoundTerms:
    """The negative of log 1/K sum_k w_k; backward gives sum_k w~_k grad log w_k, with w~ = w / sum w.

    twice: the encoder gets the doubly reparameterised gradient, sum_k w~_k^2 dlog w_k/dz dz/dphi, by Tucker et al.
    (arXiv 1810.04152), which has the same mean; the decoder's gradient and all values stay what they were.
    """
    likelihood = pixels.log_prob(inference.parameters, _repeat(levels, samples))
    twice = twice and likelihood.requires_grad
    layers = [layer._replace(posterior=_held(layer.posterior)) for layer in inference.layers] if twice else None
    log_w = _log_weights(likelihood, layers or inference.layers).double().view(samples, len(levels))
    negative_bound = math.log(samples) - log_w.logsumexp(0)
    if twice:
        w = log_w.detach().softmax(0).flatten()
        if len(inference.layers) == 1:
            _rescale_gradient(inference.layers[0].z, w)
        else:
            _replace_gradients(inference.layers, _log_weights(likelihood, inference.layers), w, negative_bound)
    with torch.no_grad():
        rates = _rates(inference.layers, samples)
    return BoundTerms(_mean_over_samples(-likelihood.detach(), samples), rates, negative_bound)


def _rescale_gradient(z: Tensor, w: Float64[Tensor, " KB"]) -> None:
    """With one layer all of the encoder's gradient comes through z, where it has been weighed once by w~."""
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * _beside(w, gradient))  # type: ignore[no-untyped-call]


def _replace_gradients(
    layers: tuple[Layer, ...], log_w: Float[Tensor, " KB"], w: Float64[Tensor, " KB"], negative_bound: Tensor
) -> None:
    """With several layers the gradient of z_l also comes through layers drawn from it, and would be rescaled twice.

    So what arrives at z_l gives way to w~_k^2 times the derivative of log w_k by z_l along all paths: the codes drawn from
    z_l, and the densities given it. From z_l it goes on into the weights that z_l was drawn with, and no further.
    """
    codes = [layer.z for layer in layers if layer.z.requires_grad]
    slopes = torch.autograd.grad(log_w.sum(), codes, retain_graph=True)
    arrived: list[Tensor] = []  # the derivative of the loss by each image's bound: it comes first, on the way back
    negative_bound.register_hook(arrived.append)  # type: ignore[no-untyped-call]
    for z, slope in zip(codes, slopes, strict=True):
        weighed = -slope * _beside(w.square(), slope)

        def replaced(gradient: Tensor, weighed: Tensor = weighed) -> Tensor:
            upstream = arrived[-1].repeat(len(weighed) // max(len(arrived[-1]), 1))
            return weighed * _beside(upstream, weighed)

        z.register_hook(replaced)  # type: ignore[no-untyped-call]


def _held(posterior: Gaussian) -> Gaussian:
    """As a constant: the gradient of its density goes to the code alone."""
    return type(posterior)(*(part.detach() for part in posterior))


def _log_weights(likelihood: Float[Tensor, " KB"], layers: Sequence[Layer]) -> Float[Tensor, " KB"]:
    """log p(x, z) - log q(z | x) of the codes as drawn: a divergence in closed form here would not give a bound."""
    for layer in layers:
        likelihood = likelihood + layer.prior.log_prob(layer.z) - layer.posterior.log_prob(layer.z)
    return likelihood


def _rates(layers: tuple[Layer, ...], samples: int) -> Float[Tensor, "B L"]:
    return torch.stack([_mean_over_samples(layer.rate(), samples) for layer in layers], dim=1)


def _mean_over_samples(values: Float[Tensor, " KB"], samples: int) -> Float[Tensor, " B"]:
    return values if samples == 1 else values.view(samples, len(values) // samples).mean(0)


def _repeat(levels: Tensor, samples: int) -> Tensor:
    return levels if samples == 1 else levels.repeat(samples, 1, 1, 1)


def _beside(values: Float[Tensor, " KB"], like: Tensor) -> Tensor:
    """One value per code, to be multiplied with the code's elements."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
