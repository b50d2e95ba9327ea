"""What a loader is here, and the list of them."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from tests.benchmarks.peers.pictures import Case, Pictures

BATCH = 256
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One pass over a case's images."""

    case: Case
    address: str
    """Where the loader's own format lies: s3://... or a local folder."""
    files: list[str]
    """What lies there, for those loaders that have no index of their own."""
    cache: str
    """A local folder for what the loader keeps; empty when the pass is to be cold."""
    state: str
    """A file for what a loader must save in order to resume, if it cannot say it by arithmetic."""
    saves_state: bool = False
    """Whether to write that file when the pass is left."""
    workers: int = 0
    """Processes beside the one that takes the batches."""
    rank: int = 0
    world_size: int = 1
    images_seen: int = 0
    """Where to resume in the epoch."""


class Loader(Protocol):
    """A way to stream images. Its module imports everything that it needs, since imports are not timed."""

    def write(self, pictures: Pictures, folder: Path) -> None:
        """Writes the images in the loader's own format into a local folder, to be copied to the bucket."""
        ...

    def batches(self, reading: Reading) -> Generator[torch.Tensor]:
        """One epoch from images_seen on, shuffled, uint8 [b, C, H, W]."""
        ...


@dataclass(frozen=True, kw_only=True)
class About:
    """What the benchmark has to know of a loader without importing it."""

    warm: Literal["copy", "cache"]
    """What later epochs read: a local copy of the shards, or what the first one left in the cache."""
    resumes: bool
    """Whether it can start inside an epoch."""
    is_slow: bool = False
    """Whether a pass takes minutes."""
    workers_are_slow: bool = False
    """Whether a pass with workers does."""


OURS = "ours"
FLOOR = "plain"
LOADERS = {
    OURS: About(warm="copy", resumes=True),
    "mosaicml": About(warm="cache", resumes=True),
    "litdata": About(warm="cache", resumes=True, workers_are_slow=True),
    "webdataset": About(warm="copy", resumes=False),
    "huggingface": About(warm="copy", resumes=True),
    "ray": About(warm="copy", resumes=False, is_slow=True),
    FLOOR: About(warm="copy", resumes=False),
}


def loader_of(name: str) -> Loader:
    """Imports this one loader only: the others' memory is not on its bill."""
    match name:
        case "ours":
            from tests.benchmarks.peers.ours import Ours

            return Ours()
        case "plain":
            from tests.benchmarks.peers.plain import Plain

            return Plain()
        case "mosaicml":
            from tests.benchmarks.peers.mosaicml import MosaicML

            return MosaicML()
        case "litdata":
            from tests.benchmarks.peers.lightning import LitData

            return LitData()
        case "webdataset":
            from tests.benchmarks.peers.web import WebDataset

            return WebDataset()
        case "huggingface":
            from tests.benchmarks.peers.huggingface import HuggingFace

            return HuggingFace()
        case "ray":
            from tests.benchmarks.peers.raydata import RayData

            return RayData()
        case _:
            raise ValueError(f"there is no loader {name}; there are {', '.join(LOADERS)}")
