"""What a case finds, and the settings that all share."""

import argparse
import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vaejob
from tests.benchmarks.paired import Cost, OwnProcess, Turn, Work, alternate
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource

FP32, COMPILED, BF16, BF16_COMPILED = "ours fp32", "ours fp32 compiled", "ours bf16", "ours bf16 compiled"
PRECISIONS = {
    FP32: ["training.compile=false", "training.precision=fp32"],
    COMPILED: ["training.compile=true", "training.precision=fp32"],
    BF16: ["training.compile=false", "training.precision=bf16"],
    BF16_COMPILED: ["training.compile=true", "training.precision=bf16"],
}


@dataclass(kw_only=True)
class Found:
    """A case, ready for its table."""

    case: str
    title: str
    peer: str
    """The row that ratios are over."""
    goals: dict[str, float]
    """Least ratio per CPU second, by row."""
    proofs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: dict[str, Cost] = field(default_factory=dict)
    rounds: list[dict[str, Cost]] = field(default_factory=list)

    def measure(self, passes: Mapping[str, Turn], options: argparse.Namespace) -> "Found":
        """What is found is written after every round, so that a run that is cut short has its table."""
        for line in self.proofs:
            print(f"{self.case}: {line}", flush=True)
        chosen = {name: work for name, work in passes.items() if not options.eager or "compiled" not in name}
        for first, rounds in alternate(chosen, rounds=options.rounds, seconds=60 * options.minutes):
            self.first, self.rounds = first, rounds
            options.here.write_text(json.dumps(asdict(self)))
        return self

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Found":
        first = {name: Cost(*cost) for name, cost in plain["first"].items()}
        rounds = [{name: Cost(*cost) for name, cost in one.items()} for one in plain["rounds"]]
        return cls(**{**plain, "first": first, "rounds": rounds})


def settings(options: argparse.Namespace, *own: str) -> vaejob.JobConfig:
    """A job that goes on for as long as it is asked to."""
    return vaejob.load_config(
        "mnist-iwae-1", "data.test=null", "cluster.workers=0", f"run.bucket=memory://{secrets.token_hex(4)}",
        "training.images=1000000000", "training.report_every_images=5000", "checkpoint.every_images=0",
        "training.evaluate_every_images=0", *own, *options.set,
    )  # fmt: skip


@contextlib.contextmanager
def in_own_processes(works: Mapping[str, Work]) -> Iterator[dict[str, OwnProcess]]:
    """As each is run by whoever uses it, on the main thread; forked from here, before anything was compiled."""
    passes = {name: OwnProcess(name, work) for name, work in works.items()}
    try:
        yield passes
    finally:
        for each in passes.values():
            each.end()


def pack_pictures(folder: str, *, images: int, side: int = 32) -> np.ndarray:
    """Smooth random pictures in colour, packed; what they show does not change what a step costs."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.normal(size=(images, 3, side // 8, side // 8)))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").numpy()
    pictures = np.clip(128 + 50 * smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    pack(ArraySource("smooth random pictures", pictures), folder)
    return pictures


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def gradients(*modules: nn.Module) -> Tensor:
    """Of all weights, laid end to end in their order."""
    return torch.cat([weight.grad.flatten() for module in modules for weight in module.parameters()])
