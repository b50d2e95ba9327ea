"""Pictures --encoder--> Gaussian codes --decoder--> pixel parameters: plain torch modules that know no data and no loop."""

import torch

from vaejob.config import ModelConfig
from vaejob.model.conv import ConvVAE
from vaejob.model.decoder_only import DecoderOnlyVAE
from vaejob.model.hierarchical import HierarchicalVAE
from vaejob.model.mlp import DenseVAE
from vaejob.model.tied import TiedVAE
from vaejob.model.two_layers import TwoLayerVAE
from vaejob.model.vae import VAE
from vaejob.model.vector_math import settle_vector_math

__all__ = ["VAE", "build_model"]

settle_vector_math()


def build_model(
    config: ModelConfig, *, shape: tuple[int, int, int], output_planes: int, seed: int, images: int = 0
) -> VAE:
    """The model of one job on the CPU, with weights that depend on the seed alone; decoder-only: a code for each of images."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs for good
        match config.family:
            case "mlp" if config.upper_latent:
                return TwoLayerVAE(config, shape=shape, output_planes=output_planes)
            case "mlp":
                return DenseVAE(config, shape=shape, output_planes=output_planes)
            case "conv":
                return ConvVAE(config, shape=shape, output_planes=output_planes)
            case "tied":
                return TiedVAE(config, shape=shape, output_planes=output_planes)
            case "hierarchical":
                return HierarchicalVAE(config, shape=shape, output_planes=output_planes)
            case "decoder-only":
                return DecoderOnlyVAE(config, shape=shape, output_planes=output_planes, seed=seed, images=images)
