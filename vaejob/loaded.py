"""A trained model from nothing but its run's address: encode, decode, sample, score. Needs no Ray."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from vaejob.config import JobConfig, Precision, parse_config
from vaejob.data.batches import DataSet
from vaejob.errors import CheckpointError, RunError
from vaejob.likelihood.bounds import NegativeELBO, importance_bound
from vaejob.metrics import LayerTotals, LikelihoodTotals
from vaejob.model.gaussian import Gaussian
from vaejob.model.noise import Noise, image_noise
from vaejob.storage import open_bucket
from vaejob.storage.runs import Record, choose_record, read_job
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.checkpoint import load_best, read_state
from vaejob.training.evaluate import evaluate, layer_diagnostics
from vaejob.training.passes import require_compiler
from vaejob.training.step import draw_levels, evaluation_noise, make_scorer

EXPORT_MARKER, EXPORT_FORMAT = "export.json", 1
EXPORT_FILES = ("model.safetensors", "job.yaml")
"""What an export's marker has checksums of."""


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

        Raises RunError for a ladder of codes, of which only the top one depends on the image alone, and without an encoder.
        """
        self._refuse_ladder()
        if self.job.model.family == "decoder-only":
            raise RunError(
                f"{self.address} has no encoder: no code follows from an image; use sample, or decode a code"
            )
        levels, _ = self._levels(images, ids)
        return self.scorer.vae.encode(self.scorer.pixels.to_inputs(levels))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]:
        """The mean picture of each code, in [0, 1]. Raises RunError where a picture has codes at several sizes."""
        self._refuse_ladder()
        return self.scorer.pixels.mean(self.scorer.vae.decode(z.to(self.device)))

    @torch.no_grad()
    def between(
        self, first: Float[Tensor, "B Z"], last: Float[Tensor, "B Z"], *, steps: int
    ) -> UInt8[Tensor, "B steps C H W"]:
        """Mean pictures of codes on the straight line from each first one to its last, both ends included.

        Of means of posteriors, say: a mean is no draw from the prior, whose typical length a spherical path would keep.
        """
        share = torch.linspace(0, 1, steps, device=self.device).view(1, steps, *[1] * (first.dim() - 1))
        way = torch.lerp(first.to(self.device).unsqueeze(1), last.to(self.device).unsqueeze(1), share)
        pictures = self.scorer.pixels.to_uint8(self.decode(way.flatten(0, 1)))
        return pictures.view(len(first), steps, *pictures.shape[1:])

    def _refuse_ladder(self) -> None:
        if self.job.model.family == "hierarchical":
            raise RunError(f"{self.address} has codes of several sizes for each image; use sample or reconstruct")

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

    @own_arithmetic()
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

    def evaluate(
        self,
        data: DataSet,
        *,
        samples: int = 1,
        precision: Precision = "fp32",
        compiled: bool = False,
        rank: int = 0,
        world_size: int = 1,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> LikelihoodTotals:
        """Totals over a data set, or over one of world_size parts of it, each image once; weights() tells of K > 1 samples.

        precision: of the networks' products; bf16 is faster where the hardware has it, and changes the bound a little.
        compiled: a score of several samples takes seconds to begin, and is faster from then on.
        on_progress: hears after each block how many images are scored.
        """
        if compiled:
            require_compiler("the score is to be compiled", otherwise="evaluate without --compile")
        with closing(data.evaluation_blocks(rank=rank, world_size=world_size)) as blocks:
            return evaluate(
                self.scorer,
                _counted(blocks, on_progress),
                dims_per_image=data.manifest.dims,
                config=self.job.likelihood,
                device=self.device,
                samples=samples,
                precision=precision,
                compiled=compiled,
            )

    def layer_diagnostics(self, data: DataSet, *, rank: int = 0, world_size: int = 1) -> LayerTotals:
        """Rate and active units of each stochastic layer over a data set, or over one of world_size parts of it."""
        with closing(data.evaluation_blocks(rank=rank, world_size=world_size)) as blocks:
            return layer_diagnostics(self.scorer, blocks, config=self.job.likelihood, device=self.device)

    def _levels(self, images: Tensor | np.ndarray, ids: np.ndarray | None) -> tuple[Tensor, Noise]:
        images = torch.as_tensor(images, device=self.device)
        ids = np.arange(len(images)) if ids is None else ids
        noise = evaluation_noise(ids, device=self.device)
        pixels, config = self.scorer.pixels, self.job.likelihood
        return draw_levels(images, ids, pixels=pixels, config=config, noise=noise), noise


def _counted(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], on_progress: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    done = 0
    for ids, images in blocks:
        yield ids, images
        done += len(ids)
        on_progress(done)


def load(
    address: str,
    *,
    checkpoint: str = "latest",
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """The model of the run at an address, at its latest or best checkpoint or at a number of images, with the averaged weights
    if the run has them; or that of a folder that `vaejob export` wrote, which has one checkpoint.

    on_progress: hears from any thread how many bytes of a run's state, of how many, have come.
    Raises RunError where there is no run or no such checkpoint, CheckpointError where it is damaged.
    """
    folder = Path(address).expanduser()
    if "://" not in address and (folder / EXPORT_MARKER).is_file():
        job, record, tensors = _read_export(folder)
        if checkpoint not in ("latest", "best", str(record.images_seen)):
            raise RunError(
                f"{folder} is an export of one checkpoint, {record.images_seen}; checkpoint is {checkpoint!r}"
            )
    else:
        run = open_bucket(address)
        job = read_job(run)
        record = choose_record(run, checkpoint)
        tensors = read_state(run, record, on_progress=on_progress)
    scorer = make_scorer(job, shape=record.shape, images=len(tensors.get("model.vae.table", ())))
    load_best(tensors, scorer)
    scorer.to(device).eval()
    return LoadedModel(address, job, record, scorer, torch.device(device))


def _read_export(folder: Path) -> tuple[JobConfig, Record, dict[str, Tensor]]:
    """Raises CheckpointError for an export that is not whole."""
    try:
        about = json.loads((folder / EXPORT_MARKER).read_bytes())
        if about["format"] != EXPORT_FORMAT:
            raise CheckpointError(
                f"{folder} is an export of format {about['format']}; this vaejob reads {EXPORT_FORMAT}"
            )
        contents = {name: (folder / name).read_bytes() for name in EXPORT_FILES}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != about["sha256"][name]:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 is not what {EXPORT_MARKER} says")
        record = Record.model_validate(about["record"])
        job = parse_config(contents["job.yaml"].decode(), source=str(folder / "job.yaml"))
        return job, record, load_tensors(contents["model.safetensors"])
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} of an export cannot be read: {error.strerror}; export it again"
        ) from None
    except (KeyError, TypeError, ValueError, ValidationError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / EXPORT_MARKER} is damaged ({type(error).__name__}); export it again"
        ) from None
