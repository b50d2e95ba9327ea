"""What every family of models offers the likelihood: codes drawn from a picture, and pixel parameters decoded from them.

Shapes: B images, S draws per image, C H W channels and pixels, P pixel parameters over all channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from vaejob.model.gaussian import Gaussian, kl, standard_normal
from vaejob.model.noise import LATENT, Noise


class Layer(NamedTuple):
    """One stochastic layer, given the sampled layers above it."""

    posterior: Gaussian
    prior: Gaussian
    z: Tensor
    analytic: bool = True
    """Whether KL(posterior || prior) in closed form is an unbiased rate: not where the prior was computed from this z."""

    def rate(self) -> Float[Tensor, " SB"]:
        """Nats of each draw: KL(posterior || prior), or the logarithm of their ratio at z; the latter may be negative."""
        if self.analytic:
            return kl(self.posterior, self.prior)
        return self.posterior.log_prob(self.z) - self.prior.log_prob(self.z)


class Inference(NamedTuple):
    """Codes drawn for a batch, and what they decode to."""

    layers: tuple[Layer, ...]  # from the top to the one nearest the pixels
    parameters: Float[Tensor, "SB P H W"]


class VAE(nn.Module):
    """A family with one stochastic layer says how it encodes and decodes; one with several overrides draw and generate."""

    latent_shape: tuple[int, ...]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What a deep model is made of, many alike: compiled one by one, where the whole would take too long; else nothing."""
        return ()

    @property
    def streams(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The noise that each code is drawn from, and its shape."""
        return ((LATENT, self.latent_shape),)

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Gaussian:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Float[Tensor, "B P H W"]:
        raise NotImplementedError

    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        """Lets training start at the pixels' mean instead of at grey."""
        raise NotImplementedError

    def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        """Codes for each encoded image; noise holds samples * B keys, the second draw of all images after the first."""
        posterior = encoding.repeat(samples)
        z = posterior.sample(noise.normal(LATENT, self.latent_shape))
        return Inference((Layer(posterior, standard_normal(z), z),), self.decode(z))

    def infer(self, inputs: Float[Tensor, "B C H W"], noise: Noise) -> Inference:
        """One code for each image."""
        return self.draw(self.encode(inputs), noise)

    def generate(self, noise: Noise) -> Float[Tensor, "B P H W"]:
        """Pixel parameters of codes drawn from the prior."""
        return self.decode(noise.normal(LATENT, self.latent_shape))
