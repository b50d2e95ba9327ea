"""What one GPU does: the right numbers first, then how fast, in one call that is short enough for a borrowed card.

    python tests/benchmarks/gpu.py [--only PART ...] [--minutes 8] [--json FILE]
    python tests/benchmarks/gpu.py --tiny                      the same on a CPU with small shapes, to try the script itself

ladders   hierarchical models of VDVAE's shapes for CIFAR-10, ImageNet-32 and ImageNet-64: plain float32 as a loop without
          compiler would take it, bfloat16, that compiled, and that replayed as CUDA graphs. Before it is timed, the gradient of
          each is held against that of plain float32 from the same weights, images and noise. Images/s, TFLOP/s (operations
          counted by torch's FlopCounterMode), their share of a matrix product's rate on the same card and of the roofline on an
          H200, and the most memory in use. What does not fit is tried with half the batch.
dense     the recipe mnist-iwae-1 at several batches: images/s and steps/s
stream    shards in a folder to images on the card, without a step
checkpoint  how long a state of 500 MB keeps the training thread

Steps are whole ones: noise, both passes, guard, optimiser, averaged weights. They are timed by the card's own events, after
some that do not count, twice; both figures are shown. What no longer fits into --minutes is named and left out.

CUDA graphs are a trial of torch's own (inductor's triton.cudagraphs), which no setting of a job turns on: what a graph gives
lies in memory that its next replay overwrites, and a job's totals hold the terms of 64 batches.
"""

import argparse
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.checkpoint import wait_for
from tests.benchmarks.peers.tables import line
from vaejob.config import JobConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.storage import open_bucket
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.checkpoint import StateWriter, TrainState
from vaejob.training.passes import as_trained, both_passes
from vaejob.training.resident import batches_on_device
from vaejob.training.step import in_pieces, make_scorer, move_average, train_step, training_noise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Ladder(NamedTuple):
    layers: str
    width: int
    size: int
    batch: int
    goal: float = 0.0
    """Images/s."""
    roofline: float = 0.0
    """Images/s that an H200 (790 TFLOP/s of bfloat16 products, 4.3 TB/s) allows by operations and bytes, with one pointwise
    kernel a convolution."""


LADDERS = {
    "CIFAR-10": Ladder("1x1,4x3,8x6,16x11,32x22", 384, 32, 128, 1700, 2672),
    "ImageNet-32": Ladder("1x2,4x5,8x10,16x20,32x41", 512, 32, 128, 700, 1029),
    "ImageNet-64": Ladder("1x2,4x4,8x8,16x16,32x32,64x13", 512, 64, 64, 330, 480),
}
TINY = {"tiny": Ladder("1x1,4x1,8x2", 16, 8, 4)}
PLAIN, GRAPHS = "plain float32", " as CUDA graphs"
COMPILED = ("training.precision=bf16", "training.compile=true")
VARIANTS = {
    PLAIN: (),
    "bf16": ("training.precision=bf16",),
    "bf16 compiled": COMPILED,
    f"bf16 compiled{GRAPHS}": COMPILED,
}
PIECE = 8
"""Images of a gradient that are taken at once where nothing is compiled: so that it fits wherever a step does."""
CLOSE = {"fp32": 1e-4, "bf16": 5e-2}
"""Of a gradient's distance from that of plain float32, as a share of its length."""


class Steps:
    """A job's training steps on one batch that lies on the card."""

    def __init__(self, job: JobConfig, images: Tensor) -> None:
        self.job, self.images, self.ids = job, images, np.arange(len(images))
        scorer = make_scorer(job, shape=tuple(images.shape[1:]))  # type: ignore[arg-type]
        self.state = TrainState.begin(job.optimizer, scorer.to(DEVICE), device=DEVICE)
        self.model = as_trained(self.state.scorer, job, world_size=1)

    def take(self, steps: int) -> None:
        state = self.state
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            terms = train_step(
                self.model, state.optimizer, self.images, self.ids, job=self.job, pixels=state.scorer.pixels, epoch=0,
                beta=1.0, learning_rate=1e-4, weight=1 / len(self.ids), guard=state.guard,
            )  # fmt: skip
            if state.averaged is not None:
                move_average(state.averaged, state.scorer, share=1e-4, skipped=terms.skipped)

    def gradient(self) -> Tensor:
        """Of the mean objective."""
        images = len(self.ids)
        keys = training_noise(self.ids, seed=0, epoch=0, device=DEVICE).keys
        with own_arithmetic():
            for piece in in_pieces(images, 0 if self.job.training.compile else PIECE):
                both_passes(
                    self.model, self.images[piece], keys[piece], None, job=self.job, beta=1.0, weight=1 / images
                )
        found = torch.cat([parameter.grad.flatten() for parameter in self.state.scorer.parameters()])  # type: ignore[union-attr]
        self.state.scorer.zero_grad()
        return found

    def operations(self) -> int:
        """Of one image's forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.gradient()
        return int(counter.get_total_flops() // len(self.ids))


def replayed(variant: str) -> AbstractContextManager[None]:
    """While it is open, what is compiled and called is replayed as CUDA graphs, if the variant says so."""
    context: AbstractContextManager[None] = torch._inductor.config.patch("triton.cudagraphs", variant.endswith(GRAPHS))
    return context


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"ladders": ladders, "dense": dense, "stream": stream, "checkpoint": checkpoint}
    arguments.add_argument(
        "--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts)
    )
    arguments.add_argument("--minutes", type=float, default=8.0)
    arguments.add_argument("--json", type=Path, help="a file for every figure")
    arguments.add_argument("--tiny", action="store_true")
    options = arguments.parse_args()
    if DEVICE.type == "cpu" and not options.tiny:
        raise SystemExit("torch sees no GPU here; --tiny tries the script on a CPU")
    options.until = time.monotonic() + 60 * options.minutes
    said(f"{card()}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    found: dict[str, Any] = {}
    for name in options.only:
        said(f"\n**{name}**\n")
        found[name] = parts[name](options)
        if options.json:  # after each part: the card may be taken away
            options.json.write_text(json.dumps(found))


def card() -> str:
    return torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "a CPU"


def said(text: str) -> None:
    print(text, flush=True)


def milliseconds(take: Callable[[int], None], *, warm: int, steps: int) -> float:
    """Of one step."""
    with own_arithmetic():
        take(warm)
        if DEVICE.type == "cpu":
            begun = time.perf_counter()
            take(steps)
            return 1e3 * (time.perf_counter() - begun) / steps
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        take(steps)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end) / steps)


def matrix_rate(*, size: int) -> float:
    """Operations a second of a product of square bfloat16 matrices."""
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def take(steps: int) -> None:
        for _ in range(steps):
            left @ right

    return 2 * size**3 / (milliseconds(take, warm=3, steps=10) / 1e3)


def ladders(options: argparse.Namespace) -> list[dict[str, Any]]:
    rate = matrix_rate(size=256 if options.tiny else 8192)
    said(f"A product of bfloat16 matrices runs at {rate / 1e12:.3g} TFLOP/s.\n")
    rows: list[dict[str, Any]] = []
    for name, ladder in (TINY if options.tiny else LADDERS).items():
        images = torch.randint(
            256,
            (ladder.batch, 3, ladder.size, ladder.size),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        ).to(DEVICE)
        rows_of_model: list[dict[str, Any]] = []
        for variant in VARIANTS:
            batch = ladder.batch
            while batch:
                if time.monotonic() > options.until:
                    said(f"{name}, {variant}: left out, --minutes are over")
                    break
                try:
                    rows_of_model.append(row(name, ladder, variant, images[:batch], steps=3 if options.tiny else 10))
                    break
                except torch.OutOfMemoryError:
                    said(f"{name}, {variant}: {batch} images do not fit")
                    batch //= 2
                finally:
                    if DEVICE.type == "cuda":
                        torch.cuda.empty_cache()
            else:
                said(f"{name}, {variant}: not even one image fits")
            if rows_of_model and rows_of_model[-1]["variant"] == variant:
                say(rows_of_model[-1], plain=rows_of_model[0], rate=rate, ladder=ladder)
        rows += rows_of_model
    return rows


def row(name: str, ladder: Ladder, variant: str, images: Tensor, *, steps: int) -> dict[str, Any]:
    """Raises AssertionError where the gradient is not that of plain float32, torch.OutOfMemoryError."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    plain = Steps(ladder_job(ladder, PLAIN, batch=len(images)), images)
    expected, operations = plain.gradient(), plain.operations()
    del plain
    trained = Steps(ladder_job(ladder, variant, batch=len(images)), images)
    begun = time.monotonic()
    with replayed(variant):
        gradient = trained.gradient()
        started = time.monotonic() - begun
        off = float((gradient - expected).norm() / expected.norm())
        assert off < CLOSE[trained.job.training.precision], f"{name}, {variant}: the gradient is off by {off:.1%}"
        del gradient, expected
        took = [milliseconds(trained.take, warm=3, steps=steps) for _ in range(2)]
    return {
        "model": name, "variant": variant, "weights": parameters(trained.state.scorer), "batch": len(images),
        "milliseconds": took, "images_per_second": len(images) / (statistics.mean(took) / 1e3), "gradient_off": off,
        "operations_per_image": operations, "first_passes_seconds": started,
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0,
    }  # fmt: skip


def ladder_job(ladder: Ladder, variant: str, *, batch: int) -> JobConfig:
    return vaejob.load_config(
        "mnist-iwae-1", "data.train=nowhere", "data.test=null", f"data.global_batch={batch}", "model.family=hierarchical",
        f"model.layers={ladder.layers}", f"model.width={ladder.width}", "model.latent_channels=16",
        "likelihood.pixels=discretized-logistic-mixture", "likelihood.binarize=none", "optimizer.name=adamw",
        "optimizer.clip=200", "optimizer.ema=100000", *VARIANTS[variant],
    )  # fmt: skip


def say(found: dict[str, Any], *, plain: dict[str, Any], rate: float, ladder: Ladder) -> None:
    per_second = found["images_per_second"]
    operations = per_second * found["operations_per_image"]
    said(
        f"{found['model']} ({found['weights'] / 1e6:.1f} M), batch {found['batch']}, {found['variant']}: {per_second:,.0f} images/s "
        f"({', '.join(f'{each:.1f}' for each in found['milliseconds'])} ms a step), {operations / 1e12:.3g} TFLOP/s, "
        f"{operations / rate:.1%} of a matrix product's, {per_second / plain['images_per_second']:.2f} x {plain['variant']}; gradient "
        f"off by {found['gradient_off']:.1e}; {found['peak_bytes'] / 1e9:.1f} GB; first passes {found['first_passes_seconds']:.0f} s"
        + (f"; goal {ladder.goal:,.0f} images/s" if ladder.goal else "")
        + (f", {per_second / ladder.roofline:.0%} of an H200's roofline" if ladder.roofline else "")
    )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def dense(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    said(line(["batch", "variant", "images/s", "steps/s"]))
    said(line(["---"] * 4))
    for batch in (100,) if options.tiny else (20, 100, 1000, 10_000):
        images = torch.randint(256, (batch, 1, 28, 28), dtype=torch.uint8).to(DEVICE)
        others = dict.fromkeys(("float32 compiled", f"float32 compiled{GRAPHS}"), ("training.compile=true",))
        for variant, settings in {**VARIANTS, **others}.items():
            job = vaejob.load_config(
                "mnist-iwae-1", "data.train=nowhere", "data.test=null", f"data.global_batch={batch}", *settings
            )
            steps = Steps(job, images)
            with replayed(variant):
                took = milliseconds(steps.take, warm=20, steps=50 if options.tiny else 300)
            rows.append({"batch": batch, "variant": variant, "milliseconds": took})
            said(line([f"{batch:,}", variant, f"{1e3 * batch / took:,.0f}", f"{1e3 / took:,.0f}"]))
    return rows


class Alone:
    """The only worker, of which only this is asked."""

    rank, world_size, processes_here, device = 0, 1, 1, DEVICE


def stream(options: argparse.Namespace) -> dict[str, float]:
    """Two epochs of images of 32x32x3: the first read from shards, the second by index on the card."""
    images = 2_000 if options.tiny else 200_000
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
        pack(ArraySource("noise", pixels), folder, split="train=1.0")
        data = vaejob.open_data(f"{folder}/train")
        for name, resident in (("streamed", 0), ("second epoch resident", 1 << 32)):
            job = vaejob.load_config(
                "mnist-iwae-1", f"data.train={folder}/train", "data.test=null", "likelihood.binarize=none",
                "likelihood.pixels=discretized-logistic-mixture", "data.global_batch=128", f"training.images={2 * images}",
                f"data.resident_bytes={resident}",
            )  # fmt: skip
            halves = [0.0, 0.0]
            begun, seen = time.perf_counter(), 0
            for batch, on_card in batches_on_device(data, job, Alone(), images_seen=0):  # type: ignore[arg-type]
                on_card.to(DEVICE, non_blocking=True)
                seen += len(batch.ids)
                if seen in (images, 2 * images):
                    if DEVICE.type == "cuda":
                        torch.cuda.synchronize()
                    halves[seen // images - 1], begun = time.perf_counter() - begun, time.perf_counter()
            rates[name] = images / halves[1]
            said(f"{name}: {rates[name]:,.0f} images/s ({rates[name] * 3072 / 1e9:.2f} GB/s)")
    return rates


def checkpoint(options: argparse.Namespace) -> dict[str, float]:
    width = 256 if options.tiny else 4096
    job = vaejob.load_config("mnist-iwae-1", "data.train=nowhere", f"model.hidden=[{width},{width}]")
    steps = Steps(job, torch.randint(256, (100, 1, 28, 28), dtype=torch.uint8).to(DEVICE))
    steps.take(1)
    with tempfile.TemporaryDirectory() as folder:
        writer = StateWriter(open_bucket(folder), attempt=secrets.token_hex(4), rank=0, world_size=1)
        stalls, whole = [], []
        for number in range(4):
            steps.take(5)
            begun = time.perf_counter()
            writer.save(number, steps.state.tensors())
            stalls.append(time.perf_counter() - begun)
            wait_for(writer)
            whole.append(time.perf_counter() - begun)
    size = sum(tensor.nbytes for tensor in steps.state.tensors().values())
    stall, save = statistics.median(stalls[1:]), statistics.median(whole[1:])  # the first asks for the copy's memory
    said(f"a state of {size / 1e6:.0f} MB: training stands for {stall:.3f} s, all of it is written after {save:.2f} s")
    return {"bytes": size, "stall": stall, "save": save}


if __name__ == "__main__":
    main()
