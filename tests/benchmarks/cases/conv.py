"""pythae's convolutional networks for CIFAR, trained by its trainer and by our job."""

import argparse
import copy
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tests.benchmarks.cases.case import (
    BF16,
    BF16_COMPILED,
    COMPILED,
    FP32,
    PRECISIONS,
    Found,
    gradients,
    in_own_processes,
    pack_pictures,
    relative,
    settings,
)
from tests.benchmarks.paired import repeated, whole_job
from tests.benchmarks.peers.of_pythae import cifar_peer, epochs, with_noise
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.likelihood.pixels import make_pixels
from vaejob.model.gaussian import Gaussian, gaussian
from vaejob.model.noise import LATENT
from vaejob.model.vae import VAE
from vaejob.training.step import training_noise

BATCH, LATENT_DIMS = 64, 64
TOLERANCE = 1e-4
"""Of the gradient in float32, relative: batch normalisation amplifies how sums are rounded."""


class BiasApart(nn.ConvTranspose2d):
    """As our tied family has it: oneDNN adds a bfloat16 bias number by number where the size is odd, for 300 of 490 ms."""

    def forward(self, h: Float[Tensor, "B D h w"], output_size: None = None) -> Float[Tensor, "B E H W"]:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(h)
        assert self.bias is not None
        raised = F.conv_transpose2d(
            h, self.weight, stride=self.stride, padding=self.padding, output_padding=self.output_padding
        )
        return raised + self.bias.to(raised.dtype)[:, None, None]


class TheirNetwork(VAE):
    """The peer's modules as a family of ours; the decoder ends with logits, whose sigmoid the likelihood takes."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.latent_shape = (LATENT_DIMS,)
        self.body, self.mean, self.log_var = (
            nn.Sequential(*peer.encoder.layers),
            peer.encoder.embedding,
            peer.encoder.log_var,
        )
        first, *hidden, last = peer.decoder.layers
        self.first, self.hidden, self.last = first, nn.Sequential(*hidden), last[0]
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                module.__class__ = BiasApart

    def encode(self, inputs: Float[Tensor, "B 3 32 32"]) -> Gaussian:
        features = self.body(inputs).flatten(1)
        return gaussian(self.mean(features), 0.5 * self.log_var(features))

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B 3 32 32"]:
        return self.last(self.hidden(self.first(z).view(len(z), 1024, 8, 8)))

    @torch.no_grad()
    def set_output_bias(self, parameters: Float[Tensor, "3 32 32"]) -> None:
        self.last.bias.copy_(parameters.mean((1, 2)))


def conv(options: argparse.Namespace, folder: str) -> Found:
    images = BATCH  # seconds each
    binary = (torch.from_numpy(pack_pictures(f"{folder}/data", images=4 * BATCH)[:images]) >= 128).float()
    common = [f"data.train={folder}/data/train", "likelihood.binarize=threshold", f"data.global_batch={BATCH}"]
    jobs = {name: settings(options, *common, *precision) for name, precision in PRECISIONS.items()}
    torch.manual_seed(0)
    peer, pixels = cifar_peer(latent=LATENT_DIMS), make_pixels(jobs[FP32].likelihood)
    found = Found(
        case="conv",
        title=f"pythae's convolutional VAE for 32x32x3 images, batch {BATCH}",
        peer="pythae",
        goals={FP32: 1.0, COMPILED: 1.0, BF16: 2.0, BF16_COMPILED: 2.0},
    )
    found.proofs = prove_equal(peer, binary, pixels)
    found.notes = [
        "fp32 is nearly all inside the library's convolutions",
        "in bf16 ours adds the bias beside each transposed convolution, which oneDNN adds number by number within it",
    ]

    def make_scorer(*_: object, **__: object) -> NegativeELBO:
        return NegativeELBO(TheirNetwork(copy.deepcopy(peer)), pixels)

    theirs = epochs(copy.deepcopy(peer), binary, batch=BATCH, folder=f"{folder}/pythae")
    ours = {name: whole_job(job, images=images) for name, job in jobs.items()}
    with (
        patch("vaejob.run.make_scorer", make_scorer),
        in_own_processes({found.peer: repeated(theirs), **ours}) as passes,
    ):
        return found.measure(passes, options)


def prove_equal(peer: Any, inputs: Tensor, pixels: Any) -> list[str]:
    """The same weights and noise give the same loss and gradient.

    With small logits: from 16 on the peer's sigmoid rounds to 1 in float32, and a dark pixel there is 100 nats to it.
    """
    one = copy.deepcopy(peer)
    with torch.no_grad():
        one.decoder.layers[-1][0].weight.mul_(0.1)
    other = copy.deepcopy(one)
    noise = training_noise(np.arange(len(inputs)), seed=0, epoch=0, device=torch.device("cpu"))
    terms = NegativeELBO(TheirNetwork(one), pixels)(inputs.to(torch.uint8), noise.keys)
    ours = (terms.distortion + terms.rate).mean()
    ours.backward()
    theirs = with_noise(other, noise.normal(LATENT, (LATENT_DIMS,)))({"data": inputs}).loss
    theirs.backward()
    gap, apart = abs(ours.item() / theirs.item() - 1), relative(gradients(one), gradients(other))
    assert gap < 1e-5, f"losses differ by {gap:.1e}"
    assert apart < TOLERANCE, f"gradients differ by {apart:.1e}"
    return [
        f"equal work: on the same weights and noise gradients differ by {apart:.1e} of their norm; "
        f"losses {ours.item():.3f} and {theirs.item():.3f} nats "
        "(with a tenth of the last layer's initial weights: the peer's float32 sigmoid is 1 for logits above 16)"
    ]
