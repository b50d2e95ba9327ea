"""pythae's trainer and models around modules that ours trains as well. Nothing of it is in this repository."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vaejob.model.mlp import DenseVAE

try:
    from pythae.data.datasets import BaseDataset
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.models.nn.benchmarks.cifar import Decoder_Conv_AE_CIFAR, Encoder_Conv_VAE_CIFAR
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback
except ImportError as error:
    raise SystemExit(
        f"the peer is not installed ({error}): pip install --no-deps -c tests/benchmarks/peers/constraints.txt pythae"
    ) from None


class DenseEncoder(BaseEncoder):  # type: ignore[misc]
    def __init__(self, vae: DenseVAE) -> None:
        nn.Module.__init__(self)
        self.hidden, self.posterior = vae.encoder, vae.posterior

    def forward(self, x: Tensor) -> Any:
        mean, log_std = self.posterior(self.hidden(x.flatten(1))).chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=2 * log_std)


class DenseDecoder(BaseDecoder):  # type: ignore[misc]
    def __init__(self, vae: DenseVAE) -> None:
        nn.Module.__init__(self)
        self.hidden, self.output, self.shape = vae.decoder, vae.output, vae.output_shape

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.output(self.hidden(z)).sigmoid().view(len(z), *self.shape))


def dense_peer(vae: DenseVAE, *, importance_samples: int = 0) -> Any:
    """pythae's VAE, or its IWAE, around the very modules of ours."""
    sizes = {"input_dim": vae.output_shape, "latent_dim": vae.latent_shape[0], "reconstruction_loss": "bce"}
    parts = {"encoder": DenseEncoder(vae), "decoder": DenseDecoder(vae)}
    if importance_samples:
        return IWAE(IWAEConfig(**sizes, number_samples=importance_samples), **parts)
    return VAE(VAEConfig(**sizes), **parts)


def cifar_peer(*, latent: int) -> Any:
    """pythae's VAE with its own convolutional networks for CIFAR."""
    config = VAEConfig(input_dim=(3, 32, 32), latent_dim=latent, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder_Conv_VAE_CIFAR(config), decoder=Decoder_Conv_AE_CIFAR(config))


def with_noise(model: Any, eps: Tensor) -> Any:
    """Draws these numbers where it would draw its own."""
    model._sample_gauss = lambda mean, std: (mean + eps * std, eps)
    return model


def epochs(model: Any, inputs: Tensor, *, batch: int, folder: str) -> Callable[[], int]:
    """An epoch of its own trainer with its own loader; spared are the progress bar, and copies of the best model."""
    config = BaseTrainerConfig(
        output_dir=folder, per_device_train_batch_size=batch, learning_rate=1e-3, no_cuda=True, num_epochs=1
    )
    trainer = BaseTrainer(model, BaseDataset(inputs, torch.zeros(len(inputs))), training_config=config)
    trainer.prepare_training()
    trainer.callback_handler = CallbackHandler(callbacks=[TrainingCallback()], model=model)

    def epoch() -> int:
        trainer.train_step(1)
        return len(inputs)

    return epoch
