"""What probes bring back: plain values that cross processes. Sizes are bytes, times seconds."""

from typing import Literal, NamedTuple

Conditional = Literal["kept", "ignored", "not offered", "untried"]
"""What a store does with a write on the condition that nothing is there yet; not offered: it refuses any such write."""


class Failed(NamedTuple):
    """A probe that came to nothing."""

    error: str
    wrong_input: bool = False
    """The configuration or the data is at fault, and the same command would fail again."""


class Disk(NamedTuple):
    """The file system below a folder."""

    folder: str
    free: int
    size: int
    held: int = 0
    """Bytes of the folder's own files, which may make room."""
    error: str = ""
    """Why the folder cannot be written to."""


class Gpu(NamedTuple):
    name: str
    free: int
    size: int


class Host(NamedTuple):
    """One process, and the machine it runs on."""

    node: str
    versions: dict[str, str]
    gpu: Gpu | None
    memory: int
    """Free memory of the machine, or of the container if that has less."""
    shared_memory: int | None
    """Free bytes of /dev/shm; None where there is none."""
    temporary: Disk
    cache: Disk | None
    """The folder of data.cache_dir."""
    address: str
    interface: str
    """Network interface with that address; empty if that is not known."""
    settings: str = ""
    """What the environment tells gloo and NCCL about the network."""


class Request(NamedTuple):
    """One request to the bucket."""

    verb: str
    seconds: float
    error: str = ""


class BucketUse(NamedTuple):
    """What one process could do in the bucket under a key that is gone again."""

    url: str
    requests: tuple[Request, ...]
    conditional: Conditional
    sees_driver: bool | None = None
    """Whether it finds what the driver has put there; None: not asked, or not answered."""


class DataSample(NamedTuple):
    """A data set as one process finds it, some of whose row groups it has read, checked and decoded."""

    address: str
    images: int
    shape: tuple[int, int, int]
    fingerprint: str
    row_groups: int
    checked: tuple[int, ...]
    """Numbers of those row groups."""
    read: int
    """Bytes of them."""
    seconds: float


class StepMemory(NamedTuple):
    """What a step keeps, by its parts; all but `per_image` for any batch."""

    weights: int
    gradients: int
    moments: int
    averaged: int
    fixed: int
    """Kept for the backward pass whatever the batch."""
    per_image: int
    """Kept for the backward pass for each image."""

    @property
    def state(self) -> int:
        """What a checkpoint holds."""
        return self.weights + self.moments + self.averaged

    def of_batch(self, images: int) -> int:
        return self.state + self.gradients + self.fixed + self.per_image * images


class TimedStep(NamedTuple):
    """Steps of one size in one process, without the exchange of gradients."""

    images: int
    seconds: float
    peak: int | None
    """Most device memory in use at once; None on a CPU."""
    compile_seconds: float | None = None
    """Of the step that compiled the model; None where it is not compiled."""


class Curve(NamedTuple):
    """Steps of growing batches, each in one piece, up to the largest that could be taken."""

    steps: tuple[TimedStep, ...]
    ended: Literal["memory", "estimate", "time", "size"]
    """Why there is no larger one: it did not fit; by the estimate it would not; it takes too long; there are enough."""
    refused: int = 0
    """Images of the smallest batch that did not fit, or would not by the estimate."""


class Summing(NamedTuple):
    """One all-reduce over all workers."""

    size: int
    seconds: float
    world_size: int
    backend: str

    @property
    def bus_bytes_per_second(self) -> float:
        """Over each worker's line, as NCCL's own tests count it: 2 (n - 1) / n of the bytes must pass it."""
        return 2 * (self.world_size - 1) / self.world_size * self.size / self.seconds


class Clock(NamedTuple):
    """How far a worker's clock is ahead of the driver's, which half the round trip may have blurred."""

    ahead: float
    uncertainty: float


class Places(NamedTuple):
    """How many workers found room."""

    placed: int
    asked: int
    nodes: int
    gpus_in_cluster: int
    error: str = ""
    """Why not all of them."""
    head: str = ""
    """Address of the cluster's head."""


class Speed(NamedTuple):
    """How long a step of the whole job takes, and where that is known from."""

    seconds_per_step: float
    source: str
