"""Every setting of a job, on one page: frozen sections, each key with its default, its unit and one sentence.

Nothing counts optimisation steps: progress is images seen, so a changed number of workers changes no schedule.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vaejob.errors import ConfigError

MOST_ROWS_MIXED = 2**22


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class RunConfig(Section):
    """What the run is called and where it is kept."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run: letters, digits, dot, dash, underscore; the run is kept under it in the bucket."""
    bucket: str = Field(min_length=1)
    """Where runs are kept: a folder, or s3://bucket/prefix, gs://..., az://..."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides the initial weights, the order of the images and all noise."""


class DataConfig(Section):
    """Which images, and in which order they are seen."""

    train: str = Field(min_length=1)
    """Address of the training shards: the folder that holds their manifest.json, local or in a bucket."""
    test: str | None = None
    """Address of the held-out shards; without it nothing is evaluated."""
    global_batch: int = Field(default=256, ge=1)
    """Images per optimisation step over all workers; the last batch of an epoch may be smaller."""
    lanes: int = Field(default=32, ge=1, le=65536)
    """Stretches of the epoch read side by side; at least the number of workers, so that each reads its own."""
    window_rows: int = Field(default=2048, ge=1, le=2**20)
    """Images within a lane are displaced by less than this many rows; memory and mixing grow with it."""
    prefetch_batches: int = Field(default=4, ge=1, le=256)
    """Batches each worker fetches and decodes ahead of the step."""
    cache_dir: str | None = None
    """Folder on each node's disk where its workers keep row groups that they have fetched; without it nothing is kept."""
    cache_bytes: int = Field(default=64 << 30, ge=1)
    """Most bytes the folder of cache_dir may hold, those of other data sets included."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """fail: the job ends at training images that stay damaged; skip: it goes on without them, counts and names them."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lanes * self.window_rows > MOST_ROWS_MIXED:
            raise ValueError(
                f"data.lanes x data.window_rows is {self.lanes * self.window_rows}; that many images would be held in "
                f"memory to be mixed, and {MOST_ROWS_MIXED} is the most"
            )
        return self


class ModelConfig(Section):
    """The encoder and the decoder."""

    family: Literal["mlp", "conv", "tied", "hierarchical"] = "mlp"
    """mlp: dense layers (Burda et al., 2016). conv: residual convolutions that halve the picture at each level.
    tied: the decoder uses the encoder's weights, transposed. hierarchical: a ladder of codes from coarse to fine."""
    latent: int = Field(default=50, ge=1)
    """mlp, conv, tied: dimensions of the code z of one image, the one nearest the pixels."""
    hidden: list[int] = Field(default=[200, 200], min_length=1)
    """mlp, tied: units of each hidden layer of the encoder; the decoder mirrors them."""
    upper_latent: int = Field(default=0, ge=0)
    """mlp: dimensions of a second code above the first; 0 for one stochastic layer."""
    upper_hidden: list[int] = Field(default=[100, 100], min_length=1)
    """mlp: units of each hidden layer between the two codes, in both directions."""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """mlp, tied: the non-linearity between layers."""
    tied_layers: Literal["dense", "conv"] = "dense"
    """tied: dense layers of model.hidden, or convolutions of model.channels that halve the picture, then a dense one."""
    channels: list[int] = Field(default=[32, 64], min_length=1)
    """conv, tied: channels of each level of the encoder; the decoder mirrors them."""
    blocks: int = Field(default=1, ge=1)
    """conv: residual blocks at each level."""
    layers: str = "7x2,14x2,28x1"
    """hierarchical: stochastic blocks at each resolution from the top down, as size x count, such as
    1x1,4x2,8x4,16x5,32x8; the last size is the picture's."""
    width: int = Field(default=64, ge=1)
    """hierarchical: channels of each block."""
    latent_channels: int = Field(default=16, ge=1)
    """hierarchical: channels of each block's code."""


class LikelihoodConfig(Section):
    """What a pixel is, and how probable the decoder finds it."""

    pixels: Literal[
        "bernoulli",
        "continuous-bernoulli",
        "categorical",
        "discretized-logistic",
        "discretized-logistic-mixture",
        "discretized-gaussian",
        "gaussian",
    ] = "discretized-logistic"
    """Observation model p(x | z): bernoulli needs binary pixels; gaussian and continuous-bernoulli are densities."""
    components: int = Field(default=10, ge=1, le=100)
    """discretized-logistic-mixture: logistics mixed in each pixel."""
    bits: int = Field(default=8, ge=1, le=8)
    """Grey levels per channel are 2^bits; lower bits drop the lowest digits of each 8-bit value."""
    binarize: Literal["none", "threshold", "static", "dynamic"] = "none"
    """bernoulli: threshold at half; static: drawn once per image; dynamic: drawn anew each time an image is trained on."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pixels == "bernoulli" and self.binarize == "none" and self.bits != 1:
            raise ValueError(
                "likelihood.binarize is none with bernoulli pixels; a grey level has no Bernoulli likelihood: "
                "choose binarize=threshold, static or dynamic, or pixels=discretized-logistic, discretized-logistic-mixture, "
                "discretized-gaussian, categorical, continuous-bernoulli or gaussian"
            )
        if self.pixels != "bernoulli" and self.binarize != "none":
            raise ValueError(f"likelihood.binarize is {self.binarize} with {self.pixels} pixels; it must be none")
        return self


class ObjectiveConfig(Section):
    """What is minimised; the bound itself (beta = 1) is always reported apart."""

    bound: Literal["elbo", "iwae"] = "elbo"
    """The bound on log p(x) that is trained; iwae: the importance-weighted one (Burda et al., 2016)."""
    samples: int = Field(default=1, ge=1)
    """Codes drawn per image: elbo is the mean over them, iwae the logarithm of the mean of their weights."""
    gradient: Literal["standard", "dreg"] = "standard"
    """iwae: dreg gives the encoder the doubly reparameterised gradient (Tucker et al., 2019), which varies less."""
    kl_warmup_images: int = Field(default=0, ge=0)
    """The rate's weight grows from 0 to 1 over this many images; 0 for no warm-up."""
    free_bits_nats: float = Field(default=0.0, ge=0)
    """Nats per image of each stochastic layer's rate that the objective does not press down."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("kl_warmup_images", "free_bits_nats"):
            if self.bound == "iwae" and getattr(self, name):
                raise ValueError(
                    f"objective.{name} is {getattr(self, name)} with bound=iwae, in which no rate stands apart; "
                    "it must be 0, or objective.bound=elbo"
                )
        if self.gradient == "dreg" and self.bound != "iwae":
            raise ValueError(
                f"objective.gradient is dreg with bound={self.bound}; it must be standard, or objective.bound=iwae"
            )
        return self


class OptimizerConfig(Section):
    """How the weights move."""

    name: Literal["adam", "adamw", "adamax"] = "adam"
    """Optimiser of torch.optim."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate after warm-up; never multiplied by the number of workers."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: falls to zero at training.images."""
    warmup_images: int = Field(default=0, ge=0)
    """The learning rate grows linearly over this many images."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimiser."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient; 0 for no clipping."""


class TrainingConfig(Section):
    """How long, and how often something is said."""

    images: int = Field(ge=1)
    """Images to see in all, over all epochs."""
    report_every_images: int = Field(default=50_000, ge=1)
    """Images between two rows of training metrics."""
    evaluate_every_images: int = Field(default=0, ge=0)
    """Images between two held-out evaluations; 0: only at the end."""
    evaluate_samples: int = Field(default=1, ge=1)
    """Codes drawn per held-out image: 1 gives the ELBO, more the tighter IWAE bound."""


class CheckpointConfig(Section):
    """When the state is saved, and what is kept."""

    every_images: int = Field(default=0, ge=0)
    """Images between two checkpoints; 0: only at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints with the best held-out bound that are kept besides."""


class ClusterConfig(Section):
    """Where the workers run."""

    workers: int = Field(default=1, ge=0)
    """Workers of the job, one DDP rank each; 0: in this process, without Ray."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each worker: 1 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores of each worker."""
    max_failures: int = Field(default=10, ge=0)
    """Restarts of the workers after a failure before the job gives up."""
    wait_seconds: float = Field(default=60.0, ge=0)
    """How long to wait for the cluster to have room for the workers before giving up."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a cluster is started on this machine for the run."""


class JobConfig(Section):
    """One job: the whole of what decides a run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    likelihood: LikelihoodConfig = LikelihoodConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.family == "tied" and self.likelihood.pixels in ("categorical", "discretized-logistic-mixture"):
            raise ValueError(
                f"likelihood.pixels is {self.likelihood.pixels} with model.family=tied; a transposed encoder puts out one "
                "mean of each channel: choose another of the two"
            )
        if self.model.family == "mlp" and self.model.upper_latent and self.objective.free_bits_nats:
            raise ValueError(
                f"objective.free_bits_nats is {self.objective.free_bits_nats} with model.upper_latent="
                f"{self.model.upper_latent}; the lower rate is known by its sample alone, of which nothing can be free: "
                "it must be 0"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings that decide the result; equal for runs that may continue one another."""
        decisive = dict(_decisive_settings(self))
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


# Settings that change where, how fast or how often, but not what is learnt. Data is compared by its own fingerprint.
_FREE = ("run.name", "run.bucket", "data.train", "data.test", "data.prefetch_batches", "data.cache_", "data.on_corrupt", "training.report_every_images",
         "training.evaluate_every_images", "checkpoint.", "cluster.")  # fmt: skip


def parse_config(text: str, overrides: Iterable[str] = (), *, source: str = "the configuration") -> JobConfig:
    """The job that a YAML text describes, with KEY=VALUE settings laid over it.

    Raises ConfigError, in one line, for the first setting that is unknown or wrong.
    """
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} holds no settings; it must be YAML with sections such as run, data, training")
    for override in overrides:
        _override(settings, override)
    try:
        return JobConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from None


def changed_results(old: JobConfig, new: JobConfig) -> list[str]:
    """Settings that differ and would change the result, as 'key: old -> new'."""
    before, after = dict(_decisive_settings(old)), dict(_decisive_settings(new))
    changes = [f"{key}: {before[key]} -> {after[key]}" for key in before if key in after and before[key] != after[key]]
    return changes + [f"{key}: only in one of them" for key in before.keys() ^ after.keys()]


def _decisive_settings(job: JobConfig) -> Iterator[tuple[str, Any]]:
    for section, values in job.model_dump().items():
        for key, value in values.items():
            name = f"{section}.{key}"
            # The run may be made longer, unless the learning rate is laid out over its length.
            runs_longer = name == "training.images" and job.optimizer.schedule == "constant"
            if not name.startswith(_FREE) and not runs_longer:
                yield name, value


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(
            f"{override!r} is not a setting; it must read section.key=value, such as training.images=600000"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)  # YAML reads 1e-3 as text; people mean the number
    chosen = settings.setdefault(section, {})
    if not isinstance(chosen, dict):
        raise ConfigError(f"{section} is {chosen!r}; it must be a section of settings")
    chosen[name] = parsed


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            return f"{name} is not a setting{_nearest(path)}"
        case "missing":
            return f"{name} is missing; it must be set"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            message = problem["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
            return f"{name} is {problem['input']!r}; it must be {message[0].lower() + message[1:]}"


def _nearest(path: list[str]) -> str:
    sections: Mapping[str, Any] = JobConfig.model_fields
    names = [f"{section}.{key}" for section in sections for key in sections[section].annotation.model_fields]
    if len(path) == 1:
        near = difflib.get_close_matches(path[0], sections, n=1, cutoff=0.5)
    else:
        same_key = [name for name in names if name.split(".")[1] == path[-1]]
        near = difflib.get_close_matches(".".join(path), names, n=1, cutoff=0.6) or same_key[:1]
    return f"; did you mean {near[0]}?" if near else f"; the sections are {', '.join(sections)}"
