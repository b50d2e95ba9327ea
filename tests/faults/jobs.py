"""A job that is hurt over and over, and what its run shows of it: what was lost, what was trained twice, and how soon it went on."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from tests.job.conftest import kill_tree
from vaejob.storage import open_bucket
from vaejob.storage.runs import Row, newest_record, read_rows, recorded_images

SOON_SECONDS = 600.0
"""What takes longer to train again is a hang, also on a machine that is busy with other things."""
FOR_EVER = 10**12
REPORT_EVERY = 640
JOB = """
run: {{name: {name}, bucket: "{runs}"}}
data: {{train: "{data}/train", test: "{data}/test", global_batch: 64, lanes: 6, window_rows: 64}}
model: {{family: mlp, latent: 8, hidden: [64, 64]}}
likelihood: {{pixels: discretized-logistic, bits: 4}}
training: {{images: {images}, report_every_images: {report_every}, evaluate_every_images: 6400}}
checkpoint: {{every_images: 1280}}
cluster: {{workers: {workers}, wait_seconds: 120, max_failures: 1000}}
"""


@dataclass(frozen=True)
class Outcome:
    """Of one injection."""

    seconds: float
    """From the fault to the first report of images trained after it."""
    twice: int
    """Images that had been reported as trained and were trained again."""
    lost: int
    """Images of the newest checkpoint there was, which the job did not go on from."""
    repeated: bool
    """Whether the job had ended, and its command was given again, rather than the job going on by itself."""


class Went(Exception):  # noqa: N818
    """The job did what it must not do."""


class HurtJob:
    """One run, through all of its processes."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        data: str,
        runs: str,
        images: int = FOR_EVER,
        workers: int,
        store: str,
        cluster: Callable[[], Any] | None = None,
    ) -> None:
        """cluster: makes one that is there before the job."""
        self._file = folder / f"{name}.yaml"
        self._settings = {"name": name, "runs": runs, "data": data, "workers": workers, "report_every": REPORT_EVERY}
        self._file.write_text(JOB.format(images=images, **self._settings))
        self._env = {**os.environ, "AWS_ENDPOINT_URL": store}
        self._cluster = cluster
        self._nodes: Any = None
        self.on: list[Any] = []
        """Nodes for one worker each, of such a cluster."""
        if cluster:
            self.new_nodes()
        self._log = (folder / f"{name}.log").open("a+")
        self.run = open_bucket(f"{runs}/{name}")
        self._read: dict[tuple[str, str], Row] = {}
        self.start()

    @property
    def nodes(self) -> Any:
        assert self._nodes is not None
        return self._nodes

    def new_nodes(self) -> None:
        """The cluster, if there is one, goes all at once; the next process of the job is told of another."""
        if self._nodes is not None:
            for node in self.on:
                self._nodes.lose(node)
            self._nodes.shutdown()
        assert self._cluster
        self._nodes = self._cluster()
        self.on = self._nodes.add(2)
        self._env |= self._nodes.env

    def end(self) -> None:
        self.kill()
        self._log.close()
        if self._nodes is not None:
            self._nodes.shutdown()

    def start(self) -> None:
        command = [sys.executable, "-m", "vaejob", "train", str(self._file), "--quiet"]
        enter = self._nodes.enter if self._nodes else []
        self.process = subprocess.Popen([*enter, *command], stdout=self._log, stderr=self._log, env=self._env)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]

    def child(self, name: str) -> psutil.Process | None:
        """A process that the job started on this machine."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in child.name():
                    return child
            except psutil.NoSuchProcess:
                continue
        return None

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()

    def newest_reports(self) -> dict[str, Row]:
        """The newest row of each attempt that has reported, oldest attempt first."""
        last = {key.rpartition("-")[0]: (key, version) for key, version in self.run.versions("metrics/").items()}
        for key, version in last.values():
            if (key, version) not in self._read:
                self._read[key, version] = pq.read_table(io.BytesIO(self.run.read(key))).to_pylist()[-1]
        rows = [self._read[each] for each in last.values()]
        return {row["attempt"]: row for row in rows}

    def train_a_while(self, images: int) -> None:
        """Until that many more images have been reported."""
        begun, deadline = self.reported(), time.monotonic() + SOON_SECONDS
        while self.reported() < begun + images:
            if self.process.poll() is not None:
                raise Went(f"ended with status {self.process.returncode} before anything was done to it: {self.said()}")
            if time.monotonic() > deadline:
                raise Went(f"no progress in {SOON_SECONDS:.0f} s: {self.said()}")
            time.sleep(0.2)

    def reported(self) -> int:
        return max((row["images_seen"] for row in self.newest_reports().values()), default=0)

    def hurt(self, fault: Callable[[], object]) -> Outcome:
        """Does it, and waits until an attempt that was not there before has reported training.

        Repeats the command if the job has ended.
        """
        record, hurt_at = max(recorded_images(self.run), default=0), time.time()
        fault()
        reports = self.newest_reports()
        attempts, reported = set(reports), max((row["images_seen"] for row in reports.values()), default=0)
        repeated, deadline = False, time.monotonic() + SOON_SECONDS
        while True:
            for attempt, row in reversed(self.newest_reports().items()):
                if attempt not in attempts and row["images_seen"] > row["attempt_started_at_images"]:
                    began = row["attempt_started_at_images"]
                    return Outcome(
                        seconds=time.time() - hurt_at,
                        twice=max(0, reported - began),
                        lost=max(0, record - began),
                        repeated=repeated,
                    )
            if self.process.poll() is not None:
                if self.process.returncode == 0:
                    raise Went("was over before it could recover: it is to be longer")
                if "Traceback" in self.said():
                    raise Went(f"ended with a traceback: {self.said()}")
                self.start()
                repeated = True
            if time.monotonic() > deadline:
                raise Went(f"did not train again within {SOON_SECONDS:.0f} s: {self.said()}")
            time.sleep(0.2)

    def outlast(self, fault: Callable[[], None]) -> Outcome:
        """Does it, and waits for a checkpoint that was begun after it, of a job that goes on by itself."""
        attempts = set(self.newest_reports())
        fault()
        hurt_at, reported = time.time(), self.reported()
        while max(recorded_images(self.run), default=0) <= reported:
            if self.process.poll() is not None:
                raise Went(f"ended with status {self.process.returncode}: {self.said()}")
            if time.time() > hurt_at + SOON_SECONDS:
                raise Went(f"left no checkpoint within {SOON_SECONDS:.0f} s: {self.said()}")
            time.sleep(0.2)
        if set(self.newest_reports()) != attempts:
            raise Went(f"began anew: {self.said()}")
        return Outcome(seconds=time.time() - hurt_at, twice=0, lost=0, repeated=False)

    def go_on_to_an_end(self) -> int:
        """Kills the job and repeats the command with an end; at how many images."""
        self.kill()
        images = (self.reported() // REPORT_EVERY + 3) * REPORT_EVERY
        self._file.write_text(JOB.format(images=images, **self._settings))
        self.start()
        self.finish()
        return images

    def finish(self) -> None:
        """To the end, without further faults."""
        deadline = time.monotonic() + 20 * SOON_SECONDS
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise Went(f"did not end: {self.said()}")
            time.sleep(0.2)
        if self.process.returncode:
            raise Went(f"ended with status {self.process.returncode}: {self.said()}")
        _, damage = newest_record(self.run)
        if damage:
            raise Went(f"left damage: {damage}")


def batches(run_address: str) -> list[tuple[int, str]]:
    """Which images were trained on, a report at a time."""
    rows = [row for row in read_rows(open_bucket(run_address)) if row["split"] == "train"]
    return [(row["images_seen"], row["ids_digest"]) for row in rows]


def state_digests(run_address: str) -> list[str]:
    record, _ = newest_record(open_bucket(run_address))
    assert record is not None
    return [file.sha256 for file in record.files]
