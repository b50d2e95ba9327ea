"""The rank's batches with their images: streamed, and from the end of an epoch on taken by index from the device's memory.

While an epoch streams, a rank keeps its images at their ids. At its end the ranks add up what they have, and from then on
each holds the whole data set. Which images make up a batch follows from the plan either way.
"""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from vaejob.config import JobConfig
from vaejob.data.ahead import in_background
from vaejob.data.batches import Batch, DataSet
from vaejob.errors import ConfigError
from vaejob.training.profile import stage
from vaejob.training.worker import Worker, moved

Ready = Generator[tuple[Batch, Tensor], None, None]
"""Batches, each with its images: uint8 [b, C, H, W], on the device or in memory that it reads by itself."""

SUMMED_AT_ONCE = 1 << 26
"""Bytes of one all-reduce, which takes as many again in passing."""


def batches_on_device(data: DataSet, job: JobConfig, worker: Worker, *, images_seen: int) -> Ready:
    """The rank's batches after `images_seen` images of the whole job; threads read until it is closed.

    Resumed in the middle of an epoch, the images that it trained on before are read at its end.
    """
    epoch_began = images_seen - images_seen % data.manifest.images
    epoch_ends = epoch_began + data.manifest.images
    size, most = data.unpacked_bytes, job.data.resident_bytes
    if size > most or epoch_ends >= job.training.images:
        too_large = f"data.train is streamed in each epoch: its images take {size} bytes, data.resident_bytes is {most}"
        notes = [too_large] if 0 < most < size else []
        with closing(_streamed(data, job, worker, images_seen, job.training.images)) as batches:
            for batch, images in batches:
                yield batch._replace(notes=(*notes, *batch.notes)), images
                notes = []
        return
    kept = Resident(data, worker)
    with closing(_streamed(data, job, worker, images_seen, epoch_ends)) as batches:
        for batch, on_host in batches:
            with stage("copy"):
                images = on_host.to(worker.device, non_blocking=True)
                kept.keep(batch, images)
            yield batch, images
    yield from kept.batches(job, images_seen=epoch_ends, read_before=(epoch_began, images_seen))


def resident_bytes(data: DataSet, job: JobConfig) -> int:
    """What the images will take of each worker's device; 0 where they are not to stay there."""
    size = data.unpacked_bytes
    return size if size <= job.data.resident_bytes and job.training.images > data.manifest.images else 0


class Resident:
    """A data set's images on the device: at first the rank's own of one epoch, then all of them."""

    def __init__(self, data: DataSet, worker: Worker) -> None:
        self._data, self._worker = data, worker
        channels, height, width = data.manifest.shape
        # As they lie in streamed batches: a kernel may be chosen by that, and with it how sums are rounded.
        self._channels_last = data.manifest.encoding != "raw"
        shape = (height, width, channels) if self._channels_last else (channels, height, width)
        try:
            self._pixels = torch.zeros((data.manifest.images, *shape), dtype=torch.uint8, device=worker.device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"data.resident_bytes is {data.unpacked_bytes} or more, and {worker.device} has no room for so many beside "
                "the model; set it to 0, or take smaller batches"
            ) from None
        self._there = torch.zeros(data.manifest.images, dtype=torch.uint8, device=worker.device)
        self._damaged = 0

    def keep(self, batch: Batch, images: Tensor) -> None:
        ids = torch.from_numpy(batch.ids).to(self._worker.device, non_blocking=True)
        self._pixels[ids] = images.permute(0, 2, 3, 1) if self._channels_last else images
        self._there[ids] += 1
        self._damaged += batch.missing

    def batches(self, job: JobConfig, *, images_seen: int, read_before: tuple[int, int]) -> Ready:
        """From images_seen on to the end of the job; all ranks call it. read_before: the stretch of the epoch that is not kept."""
        notes = self._read(job, *read_before)
        there = self._gather(images_seen)
        lacking, size = len(there) - int(there.sum()), self._pixels.nbytes
        assert lacking == self._damaged, (lacking, self._damaged)
        notes += [
            f"data.train is resident from {images_seen:,} images seen on: {size / 1e6:,.1f} MB on the device of each worker"
        ]
        plan = self._data.plan(job.data, seed=job.run.seed, rank=self._worker.rank, world_size=self._worker.world_size)
        nothing = np.empty((0, *self._data.manifest.shape), dtype=np.uint8)
        for place, due in plan.batches(images_seen=images_seen, until=job.training.images):
            ids = np.sort(due[there[due]] if lacking else due)
            yield Batch(place, ids, nothing, len(due) - len(ids), tuple(notes)), self._taken(ids)
            notes = []

    def _read(self, job: JobConfig, start: int, stop: int) -> list[str]:
        """Keeps images that were trained on before the job was resumed; what is to be said of them."""
        notes = dict[str, None]()
        if start < stop:
            with closing(_streamed(self._data, job, self._worker, start, stop)) as batches:
                for batch, images in batches:
                    self.keep(batch, images.to(self._worker.device, non_blocking=True))
                    notes |= dict.fromkeys(batch.notes)
                    moved(stop)
        return [*notes]

    def _gather(self, images_seen: int) -> np.ndarray:
        """Adds up what the ranks have; which images are there, bool [N]. Where one rank has an image the others have zeros."""
        if self._worker.world_size > 1:
            damaged = torch.tensor(self._damaged, device=self._worker.device)
            for part in (*torch.split(self._pixels.view(-1), SUMMED_AT_ONCE), self._there, damaged):
                torch.distributed.all_reduce(part)
                moved(images_seen)
            self._damaged = int(damaged)
        times = self._there.cpu().numpy()
        assert times.max(initial=0) <= 1, f"image {times.argmax()} was seen {times.max()} times in one epoch"
        return times.astype(bool)

    def _taken(self, ids: np.ndarray) -> Tensor:
        index = torch.from_numpy(ids)
        if self._worker.device.type == "cuda":
            index = index.pin_memory().to(self._worker.device, non_blocking=True)
        images = self._pixels.index_select(0, index)
        return images.permute(0, 3, 1, 2) if self._channels_last else images


def _streamed(data: DataSet, job: JobConfig, worker: Worker, images_seen: int, until: int) -> Ready:
    batches = data.training_batches(
        job.data,
        seed=job.run.seed,
        images_seen=images_seen,
        until=until,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    return ready_for(worker.device, batches)


def ready_for(device: torch.device, batches: Generator[Batch, None, None]) -> Ready:
    """Each batch with its images; for a GPU, in memory that it reads while the step before goes on.

    Closes the batches when it is closed itself.
    """
    pinned = device.type == "cuda"

    def tensors() -> Ready:
        with closing(batches):
            for batch in batches:
                images = torch.from_numpy(batch.images)
                yield batch, images.pin_memory() if pinned else images

    return in_background(tensors(), depth=1) if pinned else tensors()
