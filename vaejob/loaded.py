"""A trained model from nothing but its run's address: encode, decode, sample, score. Needs no Ray."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vaejob.config import JobConfig
from vaejob.data.batches import DataSet
from vaejob.errors import RunError
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.metrics import LayerTotals, LikelihoodTotals
from vaejob.model.gaussian import Gaussian
from vaejob.model.noise import Noise, image_noise
from vaejob.storage import open_bucket
from vaejob.storage.runs import Record, choose_record, read_job
from vaejob.training.checkpoint import load_state, read_state
from vaejob.training.evaluate import evaluate, layer_diagnostics
from vaejob.training.step import draw_levels, evaluation_noise, make_scorer


@dataclass(frozen=True)
class LoadedModel:
    """A model as it was at one checkpoint. Shapes: B images, C H W channels and pixels."""

    address: str
    job: JobConfig
    record: Record
    scorer: NegativeELBO
    device: torch.device

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B C H W"] | np.ndarray, ids: np.ndarray | None = None) -> Gaussian:
        """The approximate posterior q(z | x) of each image: mean and log standard deviation; of two layers the lower.

        Raises RunError for a ladder of codes, of which only the top one depends on the image alone.
        """
        self._refuse_ladder()
        levels, _ = self._levels(images, ids)
        return self.scorer.vae.encode(self.scorer.pixels.to_inputs(levels))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]:
        """The mean picture of each code, in [0, 1]. Raises RunError where a picture has codes at several sizes."""
        self._refuse_ladder()
        return self.scorer.pixels.mean(self.scorer.vae.decode(z.to(self.device)))

    def _refuse_ladder(self) -> None:
        if self.job.model.family == "hierarchical":
            raise RunError(f"{self.address} has codes of several sizes for each image; use reconstruct or sample")

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, mean: bool = False) -> UInt8[Tensor, "B C H W"]:
        """New pictures: codes from the prior, pixels drawn from p(x | z), or its mean. The same for the same seed."""
        noise = image_noise(np.arange(count), seed=seed, purpose="sample", device=self.device)
        parameters = self.scorer.vae.generate(noise)
        pixels = self.scorer.pixels
        return pixels.to_uint8(pixels.mean(parameters) if mean else pixels.sample(parameters, noise))

    @torch.no_grad()
    def reconstruct(
        self, images: UInt8[Tensor, "B C H W"] | np.ndarray, ids: np.ndarray | None = None
    ) -> tuple[UInt8[Tensor, "B C H W"], UInt8[Tensor, "B C H W"]]:
        """What the model saw of each image, and the mean picture decoded from one code drawn for it."""
        levels, noise = self._levels(images, ids)
        parameters = self.scorer.vae.infer(self.scorer.pixels.to_inputs(levels), noise).parameters
        return self.scorer.pixels.to_uint8(levels), self.scorer.pixels.to_uint8(self.scorer.pixels.mean(parameters))

    @torch.no_grad()
    def log_likelihood_bound(
        self, images: UInt8[Tensor, "B C H W"] | np.ndarray, ids: np.ndarray | None = None, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """A lower bound on log p(x) of each image, in nats: the ELBO, or the IWAE bound of several samples.

        ids (default 0, 1, ...) decide the noise: an image has the same bound under its id in any batch.
        """
        levels, noise = self._levels(images, ids)
        if samples == 1:
            terms = self.scorer(levels, noise.keys)
            return torch.neg(terms.distortion + terms.rate)
        return importance_bound(self.scorer.vae, self.scorer.pixels, levels, noise, samples=samples).log_likelihood

    def evaluate(self, data: DataSet, *, samples: int = 1, rank: int = 0, world_size: int = 1) -> LikelihoodTotals:
        """Totals over a data set, or over one of world_size parts of it, each image once; weights() tells of K > 1 samples."""
        blocks = data.evaluation_blocks(rank=rank, world_size=world_size)
        return evaluate(
            self.scorer,
            blocks,
            dims_per_image=data.manifest.dims,
            config=self.job.likelihood,
            device=self.device,
            samples=samples,
        )

    def layer_diagnostics(self, data: DataSet, *, rank: int = 0, world_size: int = 1) -> LayerTotals:
        """Rate and active units of each stochastic layer over a data set, or over one of world_size parts of it."""
        blocks = data.evaluation_blocks(rank=rank, world_size=world_size)
        return layer_diagnostics(self.scorer, blocks, config=self.job.likelihood, device=self.device)

    def _levels(self, images: Tensor | np.ndarray, ids: np.ndarray | None) -> tuple[Tensor, Noise]:
        images = torch.as_tensor(images, device=self.device)
        ids = np.arange(len(images)) if ids is None else ids
        noise = evaluation_noise(ids, device=self.device)
        pixels, config = self.scorer.pixels, self.job.likelihood
        return draw_levels(images, ids, pixels=pixels, config=config, noise=noise), noise


def load(address: str, *, checkpoint: str = "latest", device: str | torch.device = "cpu") -> LoadedModel:
    """The model of the run at an address, at its latest or best checkpoint or at a number of images.

    Raises RunError where there is no run or no such checkpoint, CheckpointError where it is damaged.
    """
    run = open_bucket(address)
    job = read_job(run)
    record = choose_record(run, checkpoint)
    scorer = make_scorer(job, shape=record.shape)
    load_state(read_state(run, record), scorer, optimizer=None)
    scorer.to(device).eval()
    return LoadedModel(address, job, record, scorer, torch.device(device))
