"""Dense encoder and decoder with two stochastic layers, after Burda, Grosse and Salakhutdinov (arXiv 1509.00519).

The encoder goes up, q(z1 | x) q(z2 | z1), the decoder comes down, p(z2) p(z1 | z2) p(x | z1).

Shapes: B images, S draws per image, C H W channels and pixels, P pixel parameters over all channels.
"""

from jaxtyping import Float
from torch import Tensor, nn

from vaejob.config import ModelConfig
from vaejob.model.gaussian import Gaussian, gaussian, standard_normal
from vaejob.model.mlp import ACTIVATIONS, DenseVAE, check_units, dense, glorot
from vaejob.model.noise import LATENT, Noise
from vaejob.model.vae import Inference, Layer


class TwoLayerVAE(DenseVAE):
    """encode and decode are those of the lower code z1; the upper code z2 replaces its standard normal prior."""

    def __init__(self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int) -> None:
        super().__init__(config, shape=shape, output_planes=output_planes)
        check_units("upper_hidden", config.upper_hidden)
        activation, units = ACTIVATIONS[config.activation], config.upper_hidden
        self.upper_latent_shape = (config.upper_latent,)
        self.upper_encoder = dense([config.latent, *units], activation)
        self.upper_posterior = nn.Linear(units[-1], 2 * config.upper_latent)
        self.upper_decoder = dense([config.upper_latent, *units[::-1]], activation)
        self.lower_prior = nn.Linear(units[0], 2 * config.latent)
        for module in (self.upper_encoder, self.upper_posterior, self.upper_decoder, self.lower_prior):
            module.apply(glorot)

    @property
    def streams(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return ((LATENT, self.upper_latent_shape), (LATENT + 1, self.latent_shape))

    def encode_upper(self, z1: Float[Tensor, "SB latent"]) -> Gaussian:
        """q(z2 | z1)"""
        return gaussian(*self.upper_posterior(self.upper_encoder(z1)).chunk(2, dim=1), bounded=self.bounded)

    def decode_upper(self, z2: Float[Tensor, "SB upper"]) -> Gaussian:
        """p(z1 | z2)"""
        return gaussian(*self.lower_prior(self.upper_decoder(z2)).chunk(2, dim=1), bounded=self.bounded)

    def draw(self, encoding: Gaussian, noise: Noise, *, samples: int = 1) -> Inference:
        posterior = encoding.repeat(samples)
        z1 = posterior.sample(noise.normal(LATENT + 1, self.latent_shape))
        upper_posterior = self.encode_upper(z1)
        z2 = upper_posterior.sample(noise.normal(LATENT, self.upper_latent_shape))
        upper = Layer(upper_posterior, standard_normal(z2), z2)
        # z2 was drawn from z1, so E log p(z1 | z2) is no expectation over q(z1 | x) at a given z2.
        lower = Layer(posterior, self.decode_upper(z2), z1, analytic=False)
        return Inference((upper, lower), self.decode(z1))

    def generate(self, noise: Noise) -> Float[Tensor, "B P H W"]:
        prior = self.decode_upper(noise.normal(LATENT, self.upper_latent_shape))
        return self.decode(prior.sample(noise.normal(LATENT + 1, self.latent_shape)))
