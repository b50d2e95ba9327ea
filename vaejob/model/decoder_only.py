"""A dense decoder without an encoder: a VAE whose approximate posterior is the prior, whatever the picture.

Its ELBO is E log p(x | z) over codes z of the prior, at a rate of 0; its bound of K samples is importance sampling of
log p(x) from the prior. Or each image has a code of its own: then log p(x | z) is no bound on log p(x).

Shapes: B images, C H W channels and pixels, P pixel parameters over all channels.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vaejob.config import ModelConfig
from vaejob.errors import ConfigError
from vaejob.model.gaussian import Gaussian, standard_normal
from vaejob.model.mlp import ACTIVATIONS, check_units, dense, glorot
from vaejob.model.noise import LATENT, image_noise
from vaejob.model.vae import VAE

MOST_TABLE_ELEMENTS = 2**28
_ROWS_AT_ONCE = 2**16


class DecoderOnlyVAE(VAE):
    """The decoder of `DenseVAE`; with images > 0 also a table of their codes, learnt as in GLO (arXiv 1707.05776).

    The table is one dense parameter of every rank, and so are its moments: it is for some 10^6 images, not for 10^9.
    """

    def __init__(
        self, config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int, seed: int, images: int = 0
    ) -> None:
        super().__init__()
        check_units("hidden", config.hidden)
        if images * config.latent > MOST_TABLE_ELEMENTS:
            raise ConfigError(
                f"objective.pairing is latent-table for {images} images with model.latent={config.latent}; every worker "
                f"holds the whole table, so it must have at most {MOST_TABLE_ELEMENTS} elements"
            )
        self.seed = seed
        self.latent_shape = (config.latent,)
        self.output_shape = (output_planes, *shape[1:])
        self.decoder = dense([config.latent, *config.hidden[::-1]], ACTIVATIONS[config.activation])
        self.output = nn.Linear(config.hidden[0], math.prod(self.output_shape))
        self.apply(glorot)
        rows = [self.drawn_codes(ids) for ids in torch.split(torch.arange(images), _ROWS_AT_ONCE)]
        self.table = nn.Parameter(torch.cat(rows)) if images else None

    def encode(self, inputs: Float[Tensor, "B C H W"]) -> Gaussian:
        """The prior."""
        return standard_normal(inputs.new_zeros(inputs.shape[0], *self.latent_shape))

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B P H W"]:
        parameters: Tensor = self.output(self.decoder(z))
        return parameters.view(z.shape[0], *self.output_shape)

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "P H W"]) -> None:
        self.output.bias.copy_(parameters.flatten())

    def own_codes(self, ids: Int64[Tensor, " B"]) -> Float[Tensor, "B latent"]:
        """The code that belongs to each image: its row of the table, projected to |z|^2 <= latent, or what was drawn."""
        if self.table is None:
            return self.drawn_codes(ids)
        rows, (most,) = self.table[ids], self.latent_shape
        return rows * (most / rows.square().sum(1, keepdim=True).clamp(min=most)).sqrt()

    def drawn_codes(self, ids: Int64[Tensor, " B"]) -> Float[Tensor, "B latent"]:
        """From N(0, I), once and for all: by the seed and the sample's id alone."""
        noise = image_noise(ids, seed=self.seed, purpose="code", device=ids.device)
        return noise.normal(LATENT, self.latent_shape)
