"""Every setting of a job, on one page: frozen sections, each key with its default, its unit and one sentence.

A number's unit is a word of its key, or stands in brackets behind the sentence; `vaejob settings` reads it there.
Nothing counts optimisation steps: progress is images seen, so a changed number of workers changes no schedule.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vaejob.errors import ConfigError

MOST_ROWS_MIXED = 2**22

Precision = Literal["fp32", "bf16"]
Tracker = Literal["mlflow", "wandb"]


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
    """Decides the initial weights, the order of the images and all noise. [no unit]"""
    trackers: tuple[Tracker, ...] = ()
    """Where the driver also sends the numbers as they come: mlflow, wandb; the run itself keeps them all without any."""


class DataConfig(Section):
    """Which images, and in which order they are seen."""

    train: str = Field(min_length=1)
    """Address of the training shards: the folder that holds their manifest.json, local or in a bucket."""
    test: str | None = None
    """Address of the held-out shards; without it nothing is evaluated."""
    global_batch: int = Field(default=256, ge=1)
    """Images per optimisation step over all workers; the last batch of an epoch may be smaller. [images]"""
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
    resident_bytes: int = Field(default=0, ge=0)
    """Most bytes that the unpacked training images may take on each worker's device, to be kept there from the end of the
    first epoch on; larger sets, and with 0 any, are read anew in each epoch."""
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

    family: Literal["mlp", "conv", "tied", "hierarchical", "decoder-only"] = "mlp"
    """mlp: dense layers (Burda et al., 2016). conv: residual convolutions that halve the picture at each level.
    tied: the decoder uses the encoder's weights, transposed. hierarchical: a ladder of codes from coarse to fine.
    decoder-only: the decoder of mlp without an encoder, for each of objective.pairing but encoder."""
    latent: int = Field(default=50, ge=1)
    """mlp, conv, tied, decoder-only: dimensions of the code z of one image, the one nearest the pixels. [dimensions]"""
    hidden: list[int] = Field(default=[200, 200], min_length=1)
    """mlp, tied, decoder-only: units of each hidden layer of the encoder; the decoder mirrors them. [units]"""
    upper_latent: int = Field(default=0, ge=0)
    """mlp: dimensions of a second code above the first; 0 for one stochastic layer. [dimensions]"""
    upper_hidden: list[int] = Field(default=[100, 100], min_length=1)
    """mlp: units of each hidden layer between the two codes, in both directions. [units]"""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """mlp, tied, decoder-only: the non-linearity between layers."""
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
    """hierarchical: channels of each block. [channels]"""
    latent_channels: int = Field(default=16, ge=1)
    """hierarchical: channels of each block's code."""
    recompute: bool = False
    """conv, hierarchical: the backward pass computes the inside of each block once more instead of keeping it in memory."""


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
    """Grey levels per channel are 2^bits; lower bits drop the lowest digits of each 8-bit value. [bits]"""
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
    pairing: Literal["encoder", "random", "fixed-code", "latent-table"] = "encoder"
    """Where an image's code comes from; decoder-only has no encoder. random: the prior, anew each time. fixed-code: the
    prior, drawn once for each image. latent-table: a table, learnt. The last two train log p(x | z), no bound on log p(x)."""

    @property
    def own_codes(self) -> bool:
        """Whether each training image has a code of its own, given which it is scored in training."""
        return self.pairing in ("fixed-code", "latent-table")

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
    """Learning rate after warm-up; never multiplied by the number of workers. [no unit]"""
    schedule: Literal["constant", "cosine", "staged"] = "constant"
    """cosine: falls to zero at training.images. staged: from 1 to 0.1 of it in 8 stages, each of them 3 times as long as the
    one before (Burda et al., 2016)."""
    warmup_images: int = Field(default=0, ge=0)
    """The learning rate grows linearly over this many images."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimiser. [no unit]"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of past gradients, for each step. [no unit]"""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the size of past gradients, for each step. [no unit]"""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to that size before it divides. [no unit]"""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient; 0 for no clipping. [no unit]"""
    skip_factor: float = Field(default=10.0, ge=0)
    """A step is skipped if its gradient's norm is more than this many times the median of the last 64 taken, or is not
    finite; 0: only if it is not finite. [no unit]"""
    ema: float = Field(default=0.0, ge=0)
    """Images that averaged weights look back over, at most a tenth of those seen; models are judged and used by them.
    0 for none. [images]"""


class TrainingConfig(Section):
    """How long, and how often something is said."""

    images: int = Field(ge=1)
    """Images to see in all, over all epochs."""
    precision: Precision = "fp32"
    """bf16: encoder and decoder multiply in bfloat16 while they train; weights, likelihoods and held-out passes stay float32."""
    micro_batch: int = Field(default=0, ge=0)
    """Most images that a worker takes through the model at once; its part of a global batch is taken in so many pieces, whose
    gradients add up before workers exchange them. 0: all at once. [images]"""
    compile: bool = False
    """Compile the training step with torch.compile; the first step then takes minutes, and a C++ compiler."""
    profile: bool = False
    """Write what the time of the steps goes into, and a trace of a few of them, to profile/ in the run; a GPU is then waited
    for after each part of a step."""
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
    """Newest checkpoints that are kept. [checkpoints]"""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints with the best held-out bound that are kept besides. [checkpoints]"""
    outage_seconds: float = Field(default=1800.0, ge=0)
    """Seconds that a bucket may be out of reach. Without the run's, training goes on: reports wait in memory, and of states
    the one under way and the newest. Without the images', it waits for them."""


class ClusterConfig(Section):
    """Where the workers run."""

    workers: int | tuple[int, int] = 1
    """Workers of the job, one DDP rank each; 0: in this process, without Ray. [least, most]: as many as find room, fewer
    when a node is lost, more again when there is room; which images make up a batch stays the same."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each worker: 1 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores of each worker."""
    max_failures: int = Field(default=10, ge=0)
    """Restarts of the workers after a failure before the job gives up; nodes that are drained or preempted are none.
    [restarts]"""
    hang_seconds: float = Field(default=300.0, ge=1)
    """Workers that have trained or scored no batch for so long are killed and started again; 4 times that until the first."""
    wait_seconds: float = Field(default=60.0, ge=0)
    """How long to wait for the cluster to have room for the workers before giving up."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a cluster is started on this machine for the run."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_or_two_numbers(cls, workers: Any) -> Any:
        numbers = list(workers) if isinstance(workers, list | tuple) else [workers]
        counts = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if counts and (
            (len(numbers) == 1 and numbers[0] >= 0) or (len(numbers) == 2 and 1 <= numbers[0] <= numbers[1])
        ):
            return workers if isinstance(workers, int) else tuple(numbers) if len(numbers) == 2 else numbers[0]
        raise ValueError(
            f"cluster.workers is {workers!r}; it must be a number of workers, or [least, most] with 1 <= least <= most"
        )

    @property
    def elastic(self) -> bool:
        return not isinstance(self.workers, int)

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Patch(Section):
    """A change to one rendered object, for what no setting covers."""

    kind: Literal["RayJob", "ConfigMap", "ServiceAccount", "PodDisruptionBudget", "PodMonitor", "ray-up", "skypilot"]
    """The object, or the target whose one document it changes."""
    merge: dict[str, Any] | None
    """Laid over it (RFC 7386: null removes a key; in lists, items of the same name are merged); null: leave it out."""


class DeployConfig(Section):
    """What `vaejob render` needs to know of a cluster, and how often a submitted job is tried; training does not read it."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the objects on the cluster; else run.name. Kubernetes: a-z, 0-9 and dashes, a letter first, at most 47."""
    image: str | None = None
    """kuberay, ray-up, skypilot: the container image, as NAME@sha256:DIGEST."""
    allow_tag: bool = False
    """Take an image by its tag; a restarted node may then run another version than its peers."""
    workers_per_node: int = Field(default=1, ge=1)
    """Workers, and with cluster.gpus_per_worker=1 GPUs, on each node; it must divide cluster.workers."""
    memory_gib_per_worker: int = Field(default=8, ge=1)
    """kuberay, skypilot: memory of a node for each of its workers, in GiB."""
    head_cpus: int = Field(default=4, ge=1)
    """kuberay: CPU cores of the head, which runs the driver and no worker."""
    head_memory_gib: int = Field(default=16, ge=2)
    """kuberay: memory of the head, in GiB; a head out of memory ends the attempt."""
    spot: bool = False
    """kuberay, ray-up, skypilot: workers on machines that may be taken back; the head stays on one that may not."""
    spot_label: str = Field(default="karpenter.sh/capacity-type=spot", pattern=r"^[^=\s]+=[^=\s]+$")
    """kuberay: the label of spot nodes; eks.amazonaws.com/capacityType=SPOT, cloud.google.com/gke-spot=true, ..."""
    efa: int = Field(default=0, ge=0)
    """kuberay: EFA interfaces of each node: 32 on p5, 4 on p4d, 1 on g6e.8xlarge. [interfaces]"""
    grace_seconds: int = Field(default=120, ge=15)
    """From the notice that a node goes, or that the time is up, to its end; a checkpoint must fit in. 25 on GKE spot."""
    retries: int = Field(default=3, ge=0)
    """Times that a failed job is started again, if need be on a new cluster; it goes on from its newest checkpoint."""
    deadline_seconds: int | None = Field(default=None, ge=60)
    """kuberay: seconds until an attempt is ended, not retried. slurm: time limit, after which the job is requeued."""
    env: dict[str, str] = {}
    """Environment of every node, such as AWS_REGION or AWS_ENDPOINT_URL; no credentials."""
    queue: str | None = None
    """kuberay: the queue that admits the job, all its nodes or none. slurm: the partition."""
    scheduler: Literal["kueue", "volcano"] = "kueue"
    """kuberay: whose queue it is."""
    priority: str | None = None
    """kuberay: priority class of the queued job."""
    namespace: str = "default"
    """kuberay: namespace of all objects."""
    service_account: str = "vaejob"
    """kuberay: service account of all pods, which gives them access to the buckets."""
    service_account_annotations: dict[str, str] = {}
    """kuberay: eks.amazonaws.com/role-arn: ARN, or iam.gke.io/gcp-service-account: EMAIL."""
    secret_name: str | None = None
    """kuberay: a Secret of the namespace whose keys become environment, for buckets that know no roles."""
    node_selector: dict[str, str] = {}
    """kuberay: labels of the nodes for workers, such as node.kubernetes.io/instance-type: p5.48xlarge."""
    keep_failed_seconds: int = Field(default=0, ge=0)
    """kuberay: how long a failed job's head stays for a look, its workers freed at once; 0 with a Kueue queue."""
    setup: list[str] = []
    """slurm, skypilot: shell lines that put vaejob on PATH, such as source /shared/vaejob/bin/activate."""
    slurm_options: list[str] = []
    """slurm: more options of sbatch, such as --account=vision."""
    accelerator: str | None = None
    """skypilot: the GPU's name, such as H100."""
    region: str = "us-east-1"
    """ray-up: region of AWS."""
    instance_type: str | None = None
    """ray-up: machine of workers, such as g6e.12xlarge."""
    head_instance_type: str = "m7i.2xlarge"
    """ray-up: machine of the head."""
    instance_profile: str | None = None
    """ray-up: ARN of the instance profile that gives nodes access to the buckets."""
    patches: list[Patch] = []
    """Changes to rendered objects, checked like the rest."""


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
    deploy: DeployConfig = DeployConfig()

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
        layers = self.model.family == "hierarchical" or (self.model.family == "mlp" and self.model.upper_latent)
        if self.training.compile and layers and self.objective.gradient == "dreg":
            raise ValueError(
                "training.compile is true with objective.gradient=dreg and several stochastic layers, whose gradient a "
                "compiled graph gets wrong; set training.compile=false, or objective.gradient=standard"
            )
        self._pairing_fits()
        return self

    def _pairing_fits(self) -> None:
        pairing, family, goal = self.objective.pairing, self.model.family, self.objective
        if family == "decoder-only" and pairing == "encoder":
            raise ValueError(
                "objective.pairing is encoder with model.family=decoder-only, which has none; it must be random, fixed-code "
                "or latent-table"
            )
        if family != "decoder-only" and pairing != "encoder":
            raise ValueError(
                f"objective.pairing is {pairing} with model.family={family}, whose encoder gives each image its code; it must "
                "be encoder, or model.family=decoder-only"
            )
        if goal.own_codes and (goal.bound != "elbo" or goal.samples != 1):
            raise ValueError(
                f"objective.bound is {goal.bound} with objective.samples={goal.samples} and pairing={pairing}, which gives "
                "each image one code and no bound; they must be elbo and 1"
            )
        if pairing == "latent-table" and self.optimizer.weight_decay:
            raise ValueError(
                f"optimizer.weight_decay is {self.optimizer.weight_decay} with objective.pairing=latent-table, whose codes it "
                "would pull to 0; it must be 0"
            )

    def to_yaml(self) -> str:
        settings = self.model_dump()
        if self.deploy == DeployConfig():
            del settings["deploy"]
        return yaml.safe_dump(settings, sort_keys=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings that decide the result; equal for runs that may continue one another."""
        decisive = dict(_decisive_settings(self))
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


# Settings that change where, how fast or how often, but not what is learnt. Data is compared by its own fingerprint.
_FREE = ("run.name", "run.bucket", "run.trackers", "data.train", "data.test", "data.prefetch_batches", "data.cache_", "data.resident_bytes", "data.on_corrupt", "model.recompute", "training.report_every_images",
         "training.evaluate_every_images", "training.micro_batch", "training.compile", "training.profile", "checkpoint.", "cluster.", "deploy.")  # fmt: skip


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
