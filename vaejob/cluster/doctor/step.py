"""What a training step needs and how long it takes, found by taking some with a throw-away model on real images."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vaejob.cluster.doctor.probes import free_memory
from vaejob.cluster.doctor.results import Curve, StepMemory, TimedStep
from vaejob.config import JobConfig
from vaejob.data.batches import open_data
from vaejob.training.arithmetic import own_arithmetic
from vaejob.training.checkpoint import TrainState
from vaejob.training.heap import freed_memory_kept
from vaejob.training.passes import as_trained
from vaejob.training.step import make_scorer, move_average, train_step

SMALL, LARGER = 2, 4
"""Images of the two batches whose difference tells what one more image keeps."""
MOST_IMAGES = 1 << 16
SECONDS_OF_A_SIZE = 0.3
LONGEST_STEP_SECONDS = 4.0
LEAST_STEPS = 2
FULL_SHARE = 0.8
"""Of the free memory of a machine without GPU, which a trial leaves untouched beyond: there, too much ends processes."""


class Trial:
    """A job's model and optimiser with their initial weights, and real images to train them on."""

    def __init__(self, job: JobConfig, *, world_size: int = 1) -> None:
        """world_size: of the job, which decides what is compiled if anything is.

        Raises ConfigError for a model that does not suit the images, or without a compiler; DataError, BucketError.
        """
        data = open_data(job.data.train)
        self._job, self._images_of_data = job, data.manifest.images
        self._device = torch.device("cuda" if job.cluster.gpus_per_worker else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(job.cluster.cpus_per_worker)
        scorer = make_scorer(job, shape=data.manifest.shape, images=data.manifest.images)
        self.state = TrainState.begin(job.optimizer, scorer.to(self._device), device=self._device)
        self._model = as_trained(self.state.scorer, job, world_size=world_size)
        some = data.images(np.arange(min(int(data.row_group_rows[0]), 256, data.manifest.images)))
        self._some = torch.from_numpy(np.ascontiguousarray(some))

    def step(self, images: int) -> None:
        """One step of so many images, which repeat; on a GPU it has ended when this returns."""
        job, state = self._job, self.state
        batch = self._some[torch.arange(images) % len(self._some)]
        terms = train_step(
            self._model,
            state.optimizer,
            batch.to(self._device),
            np.arange(images) % self._images_of_data,
            job=job,
            pixels=state.scorer.pixels,
            epoch=0,
            beta=1.0,
            learning_rate=job.optimizer.learning_rate,
            weight=1 / images,
            guard=state.guard,
        )
        if state.averaged is not None:
            move_average(state.averaged, state.scorer, share=0.1, skipped=terms.skipped)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @own_arithmetic()
    def timed(self, images: int) -> TimedStep:
        """The mean of some steps after one that does not count."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with freed_memory_kept(self._device):
            began = time.perf_counter()
            self.step(images)
            compiled = time.perf_counter() - began if self._job.training.compile else None
            began, steps = time.perf_counter(), 0
            while steps < LEAST_STEPS or time.perf_counter() - began < SECONDS_OF_A_SIZE:
                self.step(images)
                steps += 1
                if time.perf_counter() - began > LONGEST_STEP_SECONDS:
                    break
        seconds = (time.perf_counter() - began) / steps
        return TimedStep(images, seconds, torch.cuda.max_memory_allocated() if on_gpu else None, compiled)

    def memory(self) -> StepMemory:
        """By the sizes of the tensors that exist, and of those that a forward pass keeps for the backward pass."""
        small, larger = self._kept(SMALL), self._kept(LARGER)
        per_image = math.ceil((larger - small) / (LARGER - SMALL))
        weights = _bytes(self.state.scorer.parameters())
        moments = (value for slots in self.state.optimizer.state.values() for value in slots.values())
        return StepMemory(
            weights=weights + _bytes(self.state.scorer.buffers()),
            gradients=weights,
            moments=_bytes(value for value in moments if isinstance(value, Tensor)),
            averaged=_bytes(self.state.averaged.parameters()) if self.state.averaged else 0,
            fixed=max(0, small - SMALL * per_image),
            per_image=per_image,
        )

    def _kept(self, images: int) -> int:
        """Bytes of the storages that autograd saves in a step, each once, the weights' own left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.state.scorer.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step(images)
        return sum(saved.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def estimate_memory(job: JobConfig) -> StepMemory:
    """Raises ConfigError for a model that does not suit the images."""
    return Trial(_as_it_stands(job)).memory()


def timed_step(job: JobConfig, *, images: int, world_size: int) -> TimedStep:
    """As the job takes it: compiled, in pieces, if the configuration says so."""
    return Trial(job, world_size=world_size).timed(images)


def measure_curve(job: JobConfig, memory: StepMemory, *, processes: int) -> Curve:
    """Steps of 1, 2, 4, ... images until they no longer fit; then of some between the last two, to know the largest better.

    Each in one piece, whatever training.micro_batch says, and not compiled: each size would be anew. processes: of the job,
    which share this machine's memory.
    """
    trial = Trial(_as_it_stands(job))
    room = math.inf if job.cluster.gpus_per_worker else FULL_SHARE * free_memory() / processes
    steps, refused = list[TimedStep](), 0
    ended: Literal["memory", "estimate", "size"] = "size"
    while images := _next_size(steps, refused):
        if memory.of_batch(images) > room:
            refused, ended = images, "estimate"
            continue
        try:
            steps.append(trial.timed(images))
        except torch.OutOfMemoryError:
            refused, ended = images, "memory"
            torch.cuda.empty_cache()
            continue
        if steps[-1].seconds > LONGEST_STEP_SECONDS / 2:
            return Curve(tuple(steps), "time")
    return Curve(tuple(steps), ended, refused)


def _as_it_stands(job: JobConfig) -> JobConfig:
    plain = job.training.model_copy(update={"micro_batch": 0, "compile": False})
    return job.model_copy(update={"training": plain})


def _next_size(steps: Sequence[TimedStep], refused: int) -> int:
    """Twice the last, or half way to what was refused until that is within an eighth; 0: enough is known."""
    fitting = steps[-1].images if steps else 0
    if not refused:
        return min(2 * fitting or 1, MOST_IMAGES) if fitting < MOST_IMAGES else 0
    return (fitting + refused) // 2 if refused - fitting > max(1, fitting // 8) else 0
