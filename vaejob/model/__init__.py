"""Pictures --encoder--> Gaussian codes --decoder--> pixel parameters: plain torch modules that know no data and no loop."""

import torch

from vaejob.config import ModelConfig
from vaejob.model.conv import ConvVAE
from vaejob.model.mlp import DenseVAE
from vaejob.model.vae import VAE

__all__ = ["VAE", "build_model"]


def build_model(config: ModelConfig, *, shape: tuple[int, int, int], parameters_per_channel: int, seed: int) -> VAE:
    """The model of one job on the CPU, with weights that depend on the seed alone."""
    family = {"mlp": DenseVAE, "conv": ConvVAE}[config.family]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs for good
        return family(config, shape=shape, parameters_per_channel=parameters_per_channel)
