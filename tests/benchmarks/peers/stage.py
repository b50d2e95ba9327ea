"""A case on its stage: written in every format, in a bucket and on disk; each pass over it is run by fresh processes."""

import os
import tempfile
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.peers.figures import FETCH, RESUME, Delivery, Setting, delivery
from tests.benchmarks.peers.loader import BATCH, LOADERS, OURS, Reading
from tests.benchmarks.peers.pictures import Case
from tests.benchmarks.peers.processes import run_together
from tests.benchmarks.peers.task import Measured, Task, Work
from tests.s3.server import S3Server, client

BUCKET = "bench"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One case's folder, and the server that holds its bucket."""

    case: Case
    folder: Path
    server: S3Server

    def make(self, *, grown_from: str | None) -> None:
        client(self.server).create_bucket(Bucket=BUCKET)
        self._run([self._task("make", OURS, self._reading(OURS), grown_from=grown_from)])

    def write(self, loader: str) -> None:
        """The loader's format: a local folder, which some warm passes read, and its copy in the bucket."""
        shards = self._shards(loader)
        shards.parent.mkdir()
        self._run([self._task("write", loader, self._reading(loader), output=str(shards))])
        s3 = client(self.server)
        for name in self._files(loader):
            s3.upload_file(str(shards / name), BUCKET, f"{loader}/{name}")

    def delivered(self, loader: str, *, workers: int) -> Delivery:
        """What an epoch delivers; without workers it leaves the cache that warm passes read."""
        reading = replace(self._reading(loader), workers=workers)
        if not workers:
            return self._compared([self._listed(reading, loader)])
        with tempfile.TemporaryDirectory(dir=self.folder) as empty:
            return self._compared([self._listed(replace(reading, cache=empty), loader)])

    def delivered_in_two(self, loader: str) -> Delivery:
        """What half an epoch, and the rest of it by a new process on another disk, deliver together."""
        with tempfile.TemporaryDirectory(dir=self.folder) as one, tempfile.TemporaryDirectory(dir=self.folder) as other:
            start = replace(self._reading(loader), cache=one, saves_state=True)
            rest = replace(self._reading(loader), cache=other, images_seen=self._half)
            return self._compared([self._listed(start, loader, until=self._half), self._listed(rest, loader)])

    def measured(self, loader: str, setting: Setting) -> Measured:
        """One pass; a cold one has an empty folder for its cache."""
        reading = replace(self._reading(loader), workers=setting.workers)
        if setting.source == "warm" and LOADERS[loader].warm == "copy":
            reading = replace(reading, address=str(self._shards(loader)))
        if setting == RESUME:
            reading = replace(reading, images_seen=self._half)
        with tempfile.TemporaryDirectory(dir=self.folder) as empty:
            if setting.source != "warm":
                reading = replace(reading, cache=empty)
            work: Work = "first batch" if setting == RESUME else "epoch"
            answers = self._run([self._task(work, loader, part) for part in ranks(loader, reading)])
        return reduce(Measured.beside, (Measured(**answer) for answer in answers))

    def ceiling(self, name: str, setting: Setting) -> Measured:
        """Bare work on what ours stored."""
        address = str(self._shards(OURS)) if setting.source == "warm" else self._reading(OURS).address
        work: Work = "fetch" if name == FETCH else "decode"
        (answer,) = self._run([self._task(work, OURS, replace(self._reading(OURS), address=address))])
        return Measured(**answer)

    @property
    def _half(self) -> int:
        return self.case.images // 2 // BATCH * BATCH

    def _shards(self, loader: str) -> Path:
        return self.folder / loader / "shards"

    def _files(self, loader: str) -> list[str]:
        shards = self._shards(loader)
        return sorted(str(path.relative_to(shards)) for path in shards.rglob("*") if path.is_file())

    def _reading(self, loader: str) -> Reading:
        return Reading(
            case=self.case,
            address=f"s3://{BUCKET}/{loader}",
            files=self._files(loader),
            cache=str(self.folder / loader / "cache"),
            state=str(self.folder / loader / "state.json"),
        )

    def _task(self, work: Work, loader: str, reading: Reading, **others: object) -> Task:
        return Task(work=work, loader=loader, reading=reading, pictures=str(self.folder / "pictures"), **others)

    def _listed(self, reading: Reading, loader: str, *, until: int | None = None) -> np.ndarray:
        """Hashes in the order of delivery; of one rank after the other where there are several."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            parts = ranks(loader, reading)
            files = [f"{folder}/{part.rank}.npy" for part in parts]
            self._run(
                [
                    self._task("list", loader, part, output=file, until=until)
                    for part, file in zip(parts, files, strict=True)
                ]
            )
            return np.concatenate([np.load(file) for file in files])

    def _compared(self, listed: list[np.ndarray]) -> Delivery:
        return delivery(np.load(self.folder / "pictures" / "hashes.npy"), np.concatenate(listed))

    def _run(self, tasks: list[Task]) -> list[dict[str, Any]]:
        # MosaicML has its own name for the endpoint
        others = {"S3_ENDPOINT_URL": self.server.endpoint, "AWS_ALLOW_HTTP": "true"}
        environment = {**os.environ, **self.server.environment, **others}
        log = self.folder / "log.txt"
        return run_together([task.to_json() for task in tasks], environment=environment, log=log)


def ranks(loader: str, reading: Reading) -> list[Reading]:
    """Ours has no worker processes: as many ranks share the epoch, as those of a training job do."""
    if loader != OURS or not reading.workers:
        return [reading]
    return [replace(reading, workers=0, rank=rank, world_size=reading.workers) for rank in range(reading.workers)]
